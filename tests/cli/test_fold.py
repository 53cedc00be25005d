import json
import signal
import subprocess
import sys
import time

import pytest

from oftfx import OFT
from tests.streaming.compare import adapter_for, sums

pytestmark = [pytest.mark.needs("typer", "rich", "transformers"), pytest.mark.slow]


@pytest.fixture
def parts(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="60KB")
    adapter = adapter_for(tiny_llama(), tmp_path / "adapter", {"all-linear": OFT(16)})
    return str(tmp_path / "base"), str(adapter), str(tmp_path / "out")


def oftfx(*arguments):
    return subprocess.run([sys.executable, "-m", "oftfx.cli", *arguments], capture_output=True, text=True, check=False)


def test_a_fold_and_its_table(parts, tmp_path):
    done = oftfx("fold", *parts, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "14 of dense: folded" in done.stdout
    assert not (tmp_path / "out").exists()
    done = oftfx("fold", *parts)
    assert done.returncode == 0, done.stderr
    assert "model.layers.1.mlp.down_proj" in done.stdout
    assert "folded default into 14 sites: 14 folded" in done.stdout
    done = oftfx("fold", *parts)
    assert done.returncode == 1
    assert "error:" in done.stdout
    assert "holds an earlier result" in done.stdout
    done = oftfx("fold", *parts, "--overwrite", "--json", "--name", "mine")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adapters"] == ["mine"]


def test_help_and_wrong_arguments(parts):
    done = oftfx("fold", "--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("--quantized", "--reference", "--dry-run", "--json", "--overwrite"))
    assert oftfx("fold", parts[0]).returncode == 2
    done = oftfx("fold", *parts, "--quantized", "calibrate")
    assert done.returncode == 1
    assert "Load the model and use oftfx.fold" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


SLOWLY = """
import os, sys, time
real = os.pwrite
os.pwrite = lambda *a: (time.sleep(0.05), real(*a))[1]
from oftfx.cli.main import main
main()
"""


def test_interrupted_and_gone_on_with(parts, tmp_path):
    oftfx("fold", *parts[:2], str(tmp_path / "undisturbed"))
    command = [sys.executable, "-c", SLOWLY, "fold", *parts]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / ".oftfx-fold-checkpoint" / "journal.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate()
    assert process.returncode == 130, (out, errors)
    assert "start the same command again to continue" in out
    assert "Traceback" not in out + errors
    assert oftfx("fold", *parts).returncode == 0
    assert sums(tmp_path / "out") == sums(tmp_path / "undisturbed")
