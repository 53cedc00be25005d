import json

import pytest
import torch

from oftfx.opened import open_model
from tests.cli.command import run

pytestmark = pytest.mark.needs("typer", "rich", "transformers", "tokenizers", "accelerate")


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize("kind", ["nf4", "fp4", "llm.int8"])
def test_bitsandbytes_codes_are_its_own(files, kind):
    """As transformers loads them from the float checkpoint, and read back as they were written."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    done = run("quantize", files.base, files.out, "--to", kind, "--json")
    assert done.status == 0, done.err
    report = json.loads(done.out)
    assert len(report["sites"]) == 14
    assert all(0 < s["relative_error"] < 0.2 for s in report["sites"])
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "llm.int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32)
    )
    theirs = AutoModelForCausalLM.from_pretrained(files.base, quantization_config=config, dtype=torch.float32)
    ours, theirs = open_model(files.out).state_dict(), theirs.state_dict()
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items() if isinstance(value, torch.Tensor))
    assert (files.out / "tokenizer.json").read_bytes() == (files.base / "tokenizer.json").read_bytes()


@pytest.mark.needs("compressed_tensors")
def test_integers_with_and_without_texts(files):
    plain = run("quantize", files.base, files.out, "--json")
    assert plain.status == 0, plain.err
    said = ["--calibration", files.texts, "--tokens", "1024", "--sequence", "32", "--force", "--json"]
    learnt = run("quantize", files.base, files.out, *said)
    assert learnt.status == 0, learnt.err
    found = json.loads(learnt.out)
    assert {s["action"] for s in found["sites"]} == {"calibrated"}
    assert found["measured"]["output_error"] < 0.3
    taken = run("quantize", files.base, files.out)
    assert (taken.status, "replace it: --force" in taken.err) == (1, True)
    assert "format" in run("inspect", files.out).out


def test_what_it_cannot(files):
    assert "expected int4, int8" in run("quantize", files.base, files.out, "--to", "int3").err
    wrong = run("quantize", files.base, files.out, "--to", "nf4", "--calibration", files.texts)
    assert "would do nothing" in wrong.err
    assert not files.out.exists()
