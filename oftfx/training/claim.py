"""A run's directory belongs to one process at a time, and to the data that the run was begun with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from oftfx.errors import OftfxError
from oftfx.files import hold, write_whole
from oftfx.typed_json import made, parsed

DATA = "oftfx_data.json"
"""SHA-256 of each file that the run reads, by what it is called in the recipe."""
_CLAIM = ".oftfx-running"


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """No other process trains in ``out`` inside; a process that ends, however it does, gives it up.

    A directory that was made for nothing is gone afterwards.

    Raises:
        OftfxError: another process does.
    """
    place, made_here = out / _CLAIM, not out.exists()
    while True:
        try:
            place.mkdir(parents=True, exist_ok=True)
            handle = hold(place)
        except BlockingIOError:
            raise OftfxError(
                f"{out}: another process trains there now; wait for its end, or choose another directory"
            ) from None
        except OSError as error:
            raise OftfxError(f"{out}: cannot be written to: {error.strerror}; choose another directory") from error
        if handle is None or _is_there(place, handle):
            break
        os.close(handle)  # who had it has taken it away in between
    try:
        yield
    finally:
        with suppress(OSError):
            place.rmdir()
            if made_here:
                out.rmdir()  # which only takes an empty one
        if handle is not None:
            os.close(handle)


def _is_there(place: Path, handle: int) -> bool:
    try:
        return os.path.samestat(place.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def check_data(out: Path, files: Mapping[str, Path]) -> None:
    """Remember what the files of a new run hold, and refuse to go on with one whose files hold something else.

    Args:
        out: of the run.
        files: by what messages call them.

    Raises:
        OftfxError: a file has changed since the run was begun.
    """
    found = {name: _digest(path) for name, path in files.items()}
    known = _known(out / DATA)
    for name, path in files.items():
        if name in known and known[name] != found[name]:
            raise OftfxError(
                f"{path} is not what this run was begun with ({name}: sha256 {known[name][:12]}, now "
                f"{found[name][:12]}); go on with the old file, or train in another directory"
            )
    if not known:
        write_whole(out / DATA, (json.dumps(found, indent=1) + "\n").encode())


def _known(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    try:
        return made(dict[str, str], parsed(file.read_text(encoding="utf-8")), file.name)
    except (OSError, ValueError) as error:
        raise OftfxError(f"{file} is damaged: {error}; remove it to go on with the files as they are") from None


def _digest(file: Path) -> str:
    """Of a folder the names and sizes of what is in it: it may hold more than can be read each time."""
    if file.is_dir():
        held = sorted((str(p.relative_to(file)), p.stat().st_size) for p in file.rglob("*") if p.is_file())
        return hashlib.sha256(repr(held).encode()).hexdigest()
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise OftfxError(f"{file}: cannot be read: {error.strerror}") from error
