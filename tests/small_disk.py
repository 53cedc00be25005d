"""A file system of its own, small enough to be filled, that can be read-only: also for root, and for writers in C."""

import gc
import os
import subprocess
from contextlib import contextmanager

import pytest

_FILLER = "filler"


class SmallDisk:
    """One that is mounted.

    Attributes:
        path: where.
    """

    def __init__(self, path):
        self.path = path

    @contextmanager
    def full(self, leave=0):
        """No more than so many bytes are free inside."""
        space = os.statvfs(self.path)
        with (self.path / _FILLER).open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, space.f_bavail * space.f_frsize - leave)
        try:
            yield
        finally:
            (self.path / _FILLER).unlink()

    @contextmanager
    def read_only(self):
        self.remount("ro")
        try:
            yield
        finally:
            self.remount("rw")

    def remount(self, option):
        gc.collect()  # deleted files that are still mapped keep it from being read-only
        subprocess.run(["mount", "-o", f"remount,{option}", self.path], check=True)

    def contents(self):
        """Every file by its name, and every directory."""
        found = sorted(p for p in self.path.rglob("*") if p.name != _FILLER)
        return {str(p.relative_to(self.path)): p.read_bytes() if p.is_file() else None for p in found}


@contextmanager
def small_disk(path, size="40m"):
    """Make a directory ``path`` that is one; the test is skipped where nobody may mount."""
    if os.name != "posix" or os.getuid() != 0:
        pytest.skip("mounts a file system")
    path.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
    if subprocess.run(mounted, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)  # a model that is still referred to maps its file
