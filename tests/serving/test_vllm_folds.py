"""Folded checkpoints in stock vLLM, without any plugin: torch's tokens."""

import pytest
import torch

import oftfx
from oftfx import OFT
from tests.ecosystem.test_gptq_awq import checkpoint, load  # noqa: F401  (a fixture)
from tests.formats.compressed_model import write_compressed
from tests.reference import randomize
from tests.serving.vllm_server import engine, greedy, same, spread

pytestmark = [
    pytest.mark.server,
    pytest.mark.needs("transformers", "gptqmodel", "optimum", "compressed_tensors"),
    pytest.mark.filterwarnings("ignore:.*kernels.*"),
    pytest.mark.filterwarnings("ignore::oftfx.errors.OftfxWarning"),
]
SIZES = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 256}
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [100, 200, 300, 17, 18], [33]]
TIES = {"float32": 1e-3, "float16": 0.05, "rounded": 0.3}
"""By how much the best token is ahead where arithmetic of this dtype may choose another; *rounded*: the server rounds
the inputs of layers to 8 bits as well, torch here does not."""
ROUNDED = {"num_bits": 8, "strategy": "token", "dynamic": True}
COMPRESSED = {
    "int4 groups": {"num_bits": 4, "group_size": 32},
    "int4 channels": {"num_bits": 4, "strategy": "channel"},
    "int8, rounded inputs": {"num_bits": 8, "strategy": "channel", "inputs": ROUNDED},
}


def folded(base, policy, directory, ids, **options):
    model = randomize(oftfx.transform(base, {"all-linear": OFT(16)}), std=0.1).eval()
    batches = [{k: v % 320 for k, v in ids(8, 40, seed=s).items()} for s in range(2)]
    result = oftfx.fold(model, quantized=policy, calibration=batches)
    result.save(directory, server="vllm", **options)
    return result.model


def test_folds_that_stock_vllm_reads(tiny_llama, checkpoint, ids, tmp_path):  # noqa: F811
    """float32 and float16, symmetric GPTQ of version 1, AWQ, and what compressed-tensors holds."""
    from transformers import AutoModelForCausalLM

    runs, expected = {}, {}

    def add(name, base, policy, *dtypes, tie=None, **options):
        directory = tmp_path / name.replace(" ", "-").replace(",", "")
        model = folded(base, policy, directory, ids, **options)
        answers = [greedy(model, p) for p in PROMPTS]
        for dtype in dtypes:
            runs[f"{name} {dtype}"], expected[f"{name} {dtype}"] = [str(directory), dtype], (answers, tie or dtype)

    add("float", spread(tiny_llama(**SIZES)), "float", "float32", "float16")
    gptq = {"method": "gptq", "version": 1, "backend": "torch"}
    for name, made, options in (
        ("gptq", gptq | {"sym": True}, {}),
        ("gptq asymmetric", gptq, {"save_as": "compressed-tensors"}),
        ("awq", {"method": "awq"}, {}),
    ):
        path, _ = checkpoint(**made, **SIZES, std=0.15)
        add(name, load(path), "calibrate", "float16", **options)
        path.rename(tmp_path / f"base-{name}")
    for name, options in COMPRESSED.items():
        write_compressed(spread(tiny_llama(**SIZES)), tmp_path / f"base-{name}", **options)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / f"base-{name}", dtype=torch.float32).eval()
        add(name, base, "calibrate", "float16", tie="rounded" if "rounded" in name else None)
    got = engine(tmp_path, runs, PROMPTS)
    wrong = {}
    for name, (answers, tie) in expected.items():
        if isinstance(got[name], str):
            wrong[name] = got[name]
        else:
            fine = [same(tokens, answer, TIES[tie]) for tokens, answer in zip(got[name], answers, strict=True)]
            if not all(fine):
                wrong[name] = fine
    assert not wrong
