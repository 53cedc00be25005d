"""A fold of files by several processes: the bytes of one, whatever becomes of them."""

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import oftfx
from oftfx.folding.record import SiteFold
from oftfx.streaming.ranks import Ranks
from tests.ecosystem.test_quantized_checkpoints import CASES, SIZES
from tests.reference import rel
from tests.streaming.compare import ALL, adapter_for, note, sums
from tests.streaming.test_quantized import CPU, load

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.needs("transformers"), pytest.mark.filterwarnings("ignore:.*other code reads:UserWarning")]
PROGRAM = """
import os, sys, time
import torch
torch.set_num_threads(1)
import oftfx
from oftfx.streaming import writer
real = os.pwrite
def pwrite(*arguments):
    time.sleep(float(os.environ["SLOWLY"]))
    return real(*arguments)
os.pwrite, writer._SYNC_BYTES = pwrite, 20_000
print("begin", flush=True)
report = oftfx.fold_checkpoint(*sys.argv[1:4], distributed=True)
print(len(report), flush=True)
assert not torch.distributed.is_initialized()  # else threads of its group may abort the process as it ends
"""
CALIBRATED = """
import os, sys
import torch
torch.set_num_threads(1)
import oftfx
from oftfx.passes.quantized import calibrate
from oftfx.streaming import writer
from tests.streaming.test_ranks import texts
real, left = calibrate.best_rounding, [int(os.environ["FAILS_AT"]) if os.environ["RANK"] == "1" else -1]
def best_rounding(*arguments):
    left[0] -= 1
    if left[0] == 0:
        raise MemoryError("no room")
    return real(*arguments)
calibrate.best_rounding = best_rounding
written = []
write = writer.Writer.write
def noted(self, unit, parts, lines, tails):
    written.extend(lines)
    return write(self, unit, parts, lines, tails)
writer.Writer.write = noted
report = oftfx.fold_checkpoint(*sys.argv[1:4], distributed=True, quantized="calibrate", calibration=texts())
print(sum(line.action == "calibrated" for line in written))
"""
"""What is printed: how many calibrated layers this process has written."""


def texts(count=9, length=24):
    """Inputs of a tiny model."""
    numbers = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 32, (2, length), generator=numbers)} for _ in range(count)]


@pytest.fixture
def parts(tiny_llama, tmp_path):
    """A base in shards, an adapter, and a directory for the result."""
    tiny_llama(hidden_size=64).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    return tmp_path / "base", adapter_for(tiny_llama(), tmp_path / "adapter", ALL), tmp_path / "out"


def start(parts, world, slowly=0.0, program=PROGRAM, fails_at=0):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for rank in range(world):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "SLOWLY": str(slowly),
               "FAILS_AT": str(fails_at), "PYTHONPATH": str(ROOT)}  # fmt: skip
        command = [sys.executable, "-W", "ignore", "-c", program, *map(str, parts)]
        found.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env))
    return found


def ended(processes):
    return [(p.communicate(timeout=120), p.returncode) for p in processes]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_the_bytes_are_those_of_one_process(world, parts, tmp_path):
    base, adapter, out = parts
    report = oftfx.fold_checkpoint(base, adapter, tmp_path / "alone")
    for (text, errors), status in ended(start(parts, world)):
        assert (text, status) == (f"begin\n{len(report)}\n", 0), errors
    assert sums(out) == sums(tmp_path / "alone")


@pytest.mark.slow
def test_one_that_dies_ends_all_and_others_go_on(parts, tmp_path):
    base, adapter, out = parts
    oftfx.fold_checkpoint(base, adapter, tmp_path / "alone")
    first, second = start(parts, 2, slowly=0.05)
    journal = out / ".oftfx-fold-checkpoint" / "journal-1.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    second.send_signal(signal.SIGKILL)
    (_, errors), status = ended([first])[0]
    second.communicate()
    assert status == 1
    assert "another process has ended early" in errors
    assert not (out / "config.json").exists()
    done = journal.read_bytes()
    for (_, errors), status in ended(start(parts, 3)):
        assert status == 0, errors
    assert done.count(b"\n") > 2
    assert sums(out) == sums(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.needs("bitsandbytes", "accelerate")
def test_what_is_calibrated_together_is_near_what_one_process_calibrates(tiny_llama, tmp_path):
    """A process that fails is a failure of both; the next run goes on. Only the first one writes calibrated layers."""
    _, make, save, _ = CASES["nf4"]
    base, out, alone = (tmp_path / name for name in ("base", "out", "alone"))
    save(make(tiny_llama(**SIZES), tmp_path / "made"), base)
    adapter = adapter_for(load(base, **CPU), tmp_path / "adapter", {"all-linear": oftfx.OFT(16)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = oftfx.fold_checkpoint(base, adapter, alone, quantized="calibrate", calibration=texts())
    (_, mine), (_, its) = both = ended(start((base, adapter, out), 2, program=CALIBRATED, fails_at=5))
    assert (mine, its) == (1, 1), both
    assert "process 1 of 2: MemoryError: no room" in both[0][0][1]
    assert "MemoryError: no room" in both[1][0][1]
    assert not (out / "config.json").exists()
    counts = []
    for (text, errors), status in ended(start((base, adapter, out), 2, program=CALIBRATED)):
        assert status == 0, errors
        counts.append(int(text))
    assert counts == [14 - 4, 0]
    assert [s.action for s in wanted] == ["calibrated"] * 14
    got = [SiteFold(**line) for line in note(out)["report"]["sites"]]
    for mine, its in zip(got, wanted, strict=True):
        assert (mine.fqn, mine.action, mine.tokens) == (its.fqn, its.action, its.tokens)
        assert mine.output_error == pytest.approx(its.output_error, rel=1e-2), mine.fqn
    ids = texts(11)[10]
    unfolded = oftfx.load_adapter(load(base, **CPU), adapter)(**ids).logits
    errors = [rel(oftfx.load_folded(o, **CPU)(**ids).logits, unfolded) for o in (out, alone)]
    assert errors[0] == pytest.approx(errors[1], rel=5e-2)


@pytest.mark.slow
def test_what_is_refused_is_refused_in_all(parts):
    out = parts[2]
    out.mkdir()
    (out / "config.json").write_text("{}")
    for (_, errors), status in ended(start(parts, 2)):
        assert status == 1
        assert "FoldError" in errors
    assert [p.name for p in out.iterdir()] == ["config.json"]


def test_alone_nothing_is_waited_for(parts, monkeypatch):
    """In a training that torchrun started, one process folds: without distributed=True it asks no other."""
    base, adapter, out = parts
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert len(oftfx.fold_checkpoint(base, adapter, out)) > 0


def test_shares_are_even_and_the_same_everywhere():
    sizes = {3: 100, 1: 60, 7: 50, 2: 50, 9: 10, 4: 0}
    shares = Ranks(0, 3).shares(sizes)
    assert sorted(k for share in shares for k in share) == sorted(sizes)
    assert max(sum(sizes[k] for k in share) for share in shares) == 100
    assert shares == Ranks(2, 3).shares(dict(reversed(sizes.items())))
    assert Ranks().shares(sizes) == [sorted(sizes)]
