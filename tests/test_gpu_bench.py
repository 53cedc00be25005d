"""`tools/bench/gpu.py`: it runs, and it claims nothing without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "tools" / "bench" / "gpu.py"
pytestmark = pytest.mark.needs("peft", "transformers")


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_all_of_it_runs_on_a_small_model(tmp_path):
    done = run("--device", "cpu", "--tiny", "--out", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert figures["tiny"]
    measured = figures["results"]["tiny, bfloat16"]
    assert list(measured) == [
        *("training step", "peak bytes of a training step", "prefill", "decode, eager", "decode, compiled"),
        "fold of all layers",
    ]
    for what, values in measured.items():
        kind = type(None) if "bytes" in what else float
        assert all(type(v) is kind for v in values.values()), (what, values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    for arguments, said in [
        ((), "no CUDA device here"),
        (("--device", "cpu"), "only --tiny is possible"),
        (("--device", "cpu", "--tiny"), "say where it goes"),
    ]:
        done = run(*arguments, *(() if "--tiny" in arguments else ("--out", tmp_path / "gpu.json")))
        assert done.returncode == 1
        assert said in done.stderr
    assert not list(tmp_path.iterdir())
