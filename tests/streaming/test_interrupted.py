"""Runs that end early: killed, out of room, at the same time. What the next one makes is the same to the byte."""

import contextlib
import errno
import os
import random
import select
import signal
import subprocess
import sys
import time

import pytest

import oftfx
from oftfx import OFT
from oftfx.errors import FoldError, OftfxWarning
from oftfx.streaming import writer
from tests.small_disk import small_disk
from tests.streaming.compare import ALL, adapter_for, files, sums

pytestmark = [pytest.mark.needs("transformers"), pytest.mark.filterwarnings("ignore:.*other code reads:UserWarning")]
HIDDEN = ".oftfx-fold-checkpoint"

PREPARED = """
import os, sys, time
from oftfx.streaming import writer, staging
import oftfx, torch
torch.set_num_threads(1)
writer._SYNC_BYTES = 20_000
real, real_rename = os.pwrite, staging.rename
def pwrite(*arguments):
    time.sleep(0.02)
    return real(*arguments)
def rename(*arguments):
    time.sleep(0.03)
    return real_rename(*arguments)
os.pwrite, staging.rename = pwrite, rename
"""
SLOWLY = (
    PREPARED
    + """
print("begin", flush=True)
oftfx.fold_checkpoint(*sys.argv[1:4])
print("end", flush=True)
"""
)
FORKED = (
    PREPARED
    + """
import transformers.models.llama.modeling_llama
for line in sys.stdin:
    child = os.fork()
    if not child:
        oftfx.fold_checkpoint(*line.rstrip().split(chr(9)))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
)
"""Processes of one that has imported everything: a fold for each line."""


@pytest.fixture
def parts(tiny_llama, tmp_path):
    """A base, an adapter, and a directory for the result."""
    tiny_llama(hidden_size=64).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    return tmp_path / "base", adapter_for(tiny_llama(), tmp_path / "adapter", ALL), tmp_path / "out"


def start(parts):
    command = [sys.executable, "-W", "ignore", "-c", SLOWLY, *map(str, parts)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begin\n"
    return process


@pytest.mark.slow
def test_killed_twenty_times(parts, tmp_path):
    base, adapter, out = parts
    before = sums(base)
    oftfx.fold_checkpoint(base, adapter, tmp_path / "undisturbed")
    command = [sys.executable, "-W", "ignore", "-c", FORKED]
    parent = subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def fold(directory, longest=None):
        """The exit status of a fold; one that takes longer is killed."""
        parent.stdin.write("\t".join(map(str, (base, adapter, directory))).encode() + b"\n")
        child = int(parent.stdout.readline())
        if not select.select([parent.stdout], [], [], longest)[0]:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(child, signal.SIGKILL)
        return int(parent.stdout.readline())

    began = time.monotonic()
    assert fold(tmp_path / "timed") == 0
    whole, kills, choose = time.monotonic() - began, 0, random.Random(7)
    while kills < 20:
        status = fold(out, choose.uniform(0.0, whole))
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        if status == 0:  # it was done before; what is there is right, and it begins again
            assert sums(out) == sums(tmp_path / "undisturbed")
            for path in sorted(out.iterdir()):
                path.unlink()
    parent.communicate()
    if not (out / "oftfx_fold.json").exists() or (out / HIDDEN).exists():
        oftfx.fold_checkpoint(base, adapter, out)
    assert sums(out) == sums(tmp_path / "undisturbed")
    assert sums(tmp_path / "timed") == sums(tmp_path / "undisturbed")
    assert sums(base) == before


class Stop(BaseException):
    """Ends a run at a place."""


@pytest.fixture
def stop_at(monkeypatch):
    """Let the writer end at its nth write, with each tensor noted at once."""
    real = os.pwrite
    monkeypatch.setattr(writer, "_SYNC_BYTES", 1)

    def begin(count, error):
        left = [count]

        def pwrite(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise error
            return real(*arguments)

        monkeypatch.setattr(os, "pwrite", pwrite)
        return lambda: count - left[0]

    return begin


@pytest.mark.parametrize("count", [0, 1, 7, 20, 33])
def test_what_was_done_is_not_done_again(parts, tmp_path, stop_at, count):
    base, adapter, out = parts
    counted = stop_at(10**6, Stop())
    oftfx.fold_checkpoint(base, adapter, tmp_path / "undisturbed")
    whole = counted()
    stop_at(count, Stop())
    with pytest.raises(Stop):
        oftfx.fold_checkpoint(base, adapter, out)
    assert [p.name for p in out.iterdir()] == [HIDDEN]
    counted = stop_at(10**6, Stop())
    oftfx.fold_checkpoint(base, adapter, out)
    assert counted() <= whole - count + 8  # what the threads had not ended
    assert files(out) == files(tmp_path / "undisturbed")


def test_a_full_disk_says_what_is_missing_and_loses_nothing(parts, tmp_path, stop_at):
    base, adapter, out = parts
    oftfx.fold_checkpoint(base, adapter, tmp_path / "undisturbed")
    stop_at(9, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(FoldError, match=r"the disk is full: [\d,]+ bytes are missing of .* run the same again"):
        oftfx.fold_checkpoint(base, adapter, out)
    assert (out / HIDDEN / "journal.jsonl").read_bytes().count(b"\n") > 1
    stop_at(10**6, Stop())
    oftfx.fold_checkpoint(base, adapter, out)
    assert files(out) == files(tmp_path / "undisturbed")


def test_no_room_is_known_before(parts, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 5))
    with pytest.raises(FoldError, match=r"out: the disk is full: [\d,]+ bytes are missing"):
        oftfx.fold_checkpoint(*parts)
    assert not parts[2].exists()


def test_a_small_file_system(parts, tmp_path):
    base, adapter, _ = parts
    with small_disk(tmp_path / "small", "200k") as small:
        with pytest.raises(FoldError, match="the disk is full"):
            oftfx.fold_checkpoint(base, adapter, small.path / "out")
        assert not [*small.path.iterdir()]
        small.remount("size=40m")
        oftfx.fold_checkpoint(base, adapter, small.path / "out")
        oftfx.load_folded(small.path / "out")


def test_other_input_starts_anew_and_says_so(parts, tiny_llama, tmp_path, stop_at):
    base, adapter, out = parts
    stop_at(9, Stop())
    with pytest.raises(Stop):
        oftfx.fold_checkpoint(base, adapter, out)
    stop_at(10**6, Stop())
    other = adapter_for(tiny_llama(), tmp_path / "other", {"*.q_proj": OFT(8)})
    with pytest.warns(OftfxWarning, match="an earlier run with other input ended early; this one starts anew"):
        oftfx.fold_checkpoint(base, other, out)
    oftfx.fold_checkpoint(base, other, tmp_path / "undisturbed")
    assert files(out) == files(tmp_path / "undisturbed")


def test_a_line_that_was_cut_off_is_done_again(parts, tmp_path, stop_at):
    base, adapter, out = parts
    stop_at(15, Stop())
    with pytest.raises(Stop):
        oftfx.fold_checkpoint(base, adapter, out)
    journal = out / HIDDEN / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])
    stop_at(10**6, Stop())
    oftfx.fold_checkpoint(base, adapter, out)
    oftfx.fold_checkpoint(base, adapter, tmp_path / "undisturbed")
    assert files(out) == files(tmp_path / "undisturbed")


def test_two_at_once(parts):
    process = start(parts)
    while not (parts[2] / HIDDEN / "journal.jsonl").exists():
        time.sleep(0.01)
    with pytest.raises(FoldError, match="another process folds into it now"):
        oftfx.fold_checkpoint(*parts)
    assert process.communicate()[0] == "end\n"
    oftfx.load_folded(parts[2])


@pytest.mark.parametrize("count", range(12))
def test_stopped_while_the_files_take_their_places(parts, tmp_path, monkeypatch, count):
    from oftfx.streaming import staging

    base, adapter, out = parts
    oftfx.fold_checkpoint(base, adapter, tmp_path / "undisturbed")
    oftfx.fold_checkpoint(base, adapter_for_one(base, tmp_path), out)  # an earlier result, to be replaced
    left, real = [count], staging.rename

    def rename(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(staging, "rename", rename)
        with pytest.raises(Stop):
            oftfx.fold_checkpoint(base, adapter, out, overwrite=True)
    oftfx.fold_checkpoint(base, adapter, out, overwrite=True)
    assert files(out) == files(tmp_path / "undisturbed")


def adapter_for_one(base, tmp_path):
    from transformers import AutoModelForCausalLM

    return adapter_for(AutoModelForCausalLM.from_pretrained(base), tmp_path / "one", {"*.v_proj": OFT(8)})
