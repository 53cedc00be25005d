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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Directories for vLLM, and the models that they are of."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("kept")
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=320, num_hidden_layers=2, pad_token_id=0, **sizes)
    base = compressed_base(spread(LlamaForCausalLM(config).eval()), folder)
    models = {}
    for name, rules, options in (
        ("own", {"all-linear": OFT(16)}, {}),
        ("transforms", SHARED, {"rotations": "transforms"}),
    ):
        result = kept(base, rules)
        result.save(folder / name, save_as="compressed-tensors", server="vllm", **options)
        models[name] = in_float32(result.model)
    folded = oftfx.fold(randomize(oftfx.transform(base, {"all-linear": OFT(16)}), std=0.1), quantized="requantize")
    for form in ("gptq", "awq"):
        folded.save(folder / form, save_as=form, server="vllm")
        models[form] = in_float32(folded.model)
    return folder, models


def test_stock_vllm(made):
    """No plugin. Code beside the weights rotates, also q, k and v each in a way of its own; GPTQ and AWQ. Transforms
    stop at an attribute that vLLM's CPU lacks, which is why they are not what is saved unless it is asked for."""
    folder, models = made
    runs = {name: [str(folder / name), "float16"] for name in ("own", "gptq", "awq", "transforms")}
    got = engine(folder, runs, PROMPTS, plugins=False, scored=True, trust_remote_code=True)
    assert "'HadamardTransform' object has no attribute 'cpu_linear'" in got.pop("transforms")
    assert not wrong(got, {name: models[name] for name in got})


def test_transforms(made):
    """vLLM's own layers rotate, on a CPU with our plugin."""
    folder, models = made
    got = engine(folder, {"transforms": [str(folder / "transforms"), "float16"]}, PROMPTS, scored=True)
    assert not wrong(got, {"transforms": models["transforms"]})
