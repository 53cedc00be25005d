import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from oftfx import OFT
from tests.cli.command import run
from tests.cli.conftest import make_tokenizer
from tests.streaming.compare import adapter_for, sums

pytestmark = [pytest.mark.needs("typer", "rich", "transformers"), pytest.mark.slow]


@pytest.fixture
def parts(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="60KB")
    adapter = adapter_for(tiny_llama(), tmp_path / "adapter", {"all-linear": OFT(16)})
    return str(tmp_path / "base"), str(adapter), str(tmp_path / "out")


def oftfx(*arguments):
    done = run(*arguments)
    return SimpleNamespace(returncode=done.status, stdout=done.out, stderr=done.err)


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
    assert "error:" in done.stderr
    assert "holds an earlier result" in done.stderr
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
    assert "'calibrate' needs calibration=" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.needs("bitsandbytes", "tokenizers", "accelerate")
def test_calibrated_on_texts(tiny_llama, tmp_path, monkeypatch):
    """The texts of a file, by the checkpoint's own tokenizer, are what the same tokens from Python are."""
    import torch

    import oftfx as library
    from tests.ecosystem.test_quantized_checkpoints import CASES, SIZES

    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # sums in the same order
    CASES["nf4"][1](tiny_llama(**SIZES), tmp_path / "made").save_pretrained(tmp_path / "base")
    adapter = adapter_for(tiny_llama(**SIZES), tmp_path / "adapter", {"all-linear": OFT(16)})
    make_tokenizer(tmp_path / "base")
    words = [f"w{i % 29}" for i in range(600)]
    lines = [{"text": " ".join(words[i : i + 50])} for i in range(0, 600, 50)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    parts = [str(tmp_path / "base"), str(adapter), str(tmp_path / "out"), "--quantized", "calibrate"]
    options = ["--calibration", str(tmp_path / "texts.jsonl"), "--tokens", "384", "--sequence", "32"]
    done = oftfx("fold", *parts, *options, "--dry-run")
    assert "14 of bnb4: calibrate" in done.stdout, done.stdout + done.stderr
    done = oftfx("fold", *parts, *options, "--hidden-states", "disk")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 calibrated" in done.stdout
    stream = [t for line in lines for t in [*(int(w[1:]) + 3 for w in line["text"].split()), 2]][:384]
    ids = torch.tensor(stream).view(12, 32)
    inputs = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids.split(4)]
    library.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "same", quantized="calibrate", calibration=inputs)
    assert sums(tmp_path / "out") == sums(tmp_path / "same")


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
    assert "the same command goes on with it" in errors
    assert "Traceback" not in out + errors
    assert oftfx("fold", *parts).returncode == 0
    assert sums(tmp_path / "out") == sums(tmp_path / "undisturbed")
