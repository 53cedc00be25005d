"""Quantized bits with rotations in front of them in vLLM, and folds in GPTQ's and AWQ's form: torch's tokens."""

import pytest
import torch

import oftfx
from oftfx import OFT
from tests.adapter.kept_models import SHARED, compressed_base, in_float32, kept
from tests.reference import randomize
from tests.serving.vllm_server import engine, greedy, same, spread

pytestmark = [
    pytest.mark.server,
    pytest.mark.needs("transformers", "compressed_tensors"),
    pytest.mark.filterwarnings("ignore::oftfx.errors.OftfxWarning"),
]
SIZES = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "attention_bias": False, "mlp_bias": False}
PROMPTS = [[5, 6, 7, 8, 200, 31, 7], [9, 10, 11], [100, 200, 300, 17, 18, 19, 20, 21, 22], [33, 34]]
TIE, ROUNDING = 0.05, 0.02
"""Logits of the tiny model are of the order of 10, so float16 rounds them to a hundredth."""


@torch.no_grad()
def scores(model, prompt):
    """torch's log-probability of each token of a prompt but the first."""
    logits = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    return [float(logits[i, t]) for i, t in enumerate(prompt[1:])]


def wrong(got, expected):
    """What is not as torch has it, by the name of the run."""
    faults = {}
    for name, model in expected.items():
        if isinstance(got[name], str):
            faults[name] = got[name]
            continue
        tokens, scored = got[name]
        fine = [same(t, greedy(model, p), TIE) for t, p in zip(tokens, PROMPTS, strict=True)]
        apart = max(
            abs(a - b) for s, p in zip(scored, PROMPTS, strict=True) for a, b in zip(s, scores(model, p), strict=True)
        )
        if not all(fine) or apart > ROUNDING:
            faults[name] = fine, apart
    return faults


def test_stock_vllm(tiny_llama, tmp_path):
    """Without any plugin: code beside the weights rotates, also q, k and v each in a way of its own; GPTQ and AWQ."""
    base = compressed_base(spread(tiny_llama(**SIZES)), tmp_path)
    expected = {}
    for name, rules in (("own", {"all-linear": OFT(16)}), ("shared", SHARED)):
        result = kept(base, rules)
        result.save(tmp_path / name, save_as="compressed-tensors", server="vllm")
        expected[name] = result.model
    folded = oftfx.fold(randomize(oftfx.transform(base, {"all-linear": OFT(16)}), std=0.1), quantized="requantize")
    for form in ("gptq", "awq"):
        folded.save(tmp_path / form, save_as=form, server="vllm")
        expected[form] = folded.model
    runs = {name: [str(tmp_path / name), "float16"] for name in expected}
    got = engine(tmp_path, runs, PROMPTS, plugins=False, scored=True, trust_remote_code=True)
    assert not wrong(got, {name: in_float32(model) for name, model in expected.items()})


def test_transforms(tiny_llama, tmp_path):
    """vLLM's own layers rotate: on a CPU with our plugin, without it they stop at the attribute that they lack."""
    base = compressed_base(spread(tiny_llama(**SIZES)), tmp_path)
    result = kept(base, SHARED)
    result.save(tmp_path / "made", save_as="compressed-tensors", server="vllm", rotations="transforms")
    runs = {"made": [str(tmp_path / "made"), "float16"]}
    assert not wrong(engine(tmp_path, runs, PROMPTS, scored=True), {"made": in_float32(result.model)})
    stock = engine(tmp_path, runs, PROMPTS, plugins=False)["made"]
    assert "'HadamardTransform' object has no attribute 'cpu_linear'" in stock
