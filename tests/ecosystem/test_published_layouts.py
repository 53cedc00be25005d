"""Folded checkpoints by readers written from the published layouts: the weights that the fold's report measured."""

import json

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

import oftfx
from oftfx import OFT
from oftfx.formats.registry import format_named, format_of
from tests.ecosystem import published
from tests.ecosystem.test_gptq_awq import KINDS, checkpoint, load  # noqa: F401  (a fixture)
from tests.ecosystem.test_quantized_checkpoints import CASES, SIZES, quantized_layers
from tests.reference import randomize

pytestmark = [pytest.mark.needs("transformers", "accelerate"), pytest.mark.filterwarnings("ignore:.*kernels.*")]
READERS = {
    "nf4": published.bnb_4_bits,
    "nf4, double": published.bnb_4_bits,
    "int8": published.bnb_8_bits,
    "hqq 4 bit": published.hqq_4_bits,
    "pack-quantized": published.pack_quantized,
    "int-quantized": published.with_scale_of_row,
    "float-quantized": published.with_scale_of_row,
}
BOUNDS = {"nf4, double": 1e-7, "int8": 1e-7}
"""Of the largest weight, where the package multiplies in another order; else to the bit."""


def of_layer(stored, path):
    return {k[len(path) + 1 :]: v for k, v in stored.items() if k.startswith(f"{path}.")}


def check(directory, folded, reader, config, stored, bound=0.0):
    layers = quantized_layers(folded)
    assert len(layers) == 14
    for path, weight_format in layers.items():
        wanted = weight_format.dequantize(folded.get_submodule(path))
        got = reader(of_layer(stored, path), config)
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() <= bound * wanted.abs().max(), path


def folded(base, policy, ids):
    model = randomize(oftfx.transform(base, {"all-linear": OFT(16)}), std=0.1)
    return oftfx.fold(model, quantized=policy, calibration=[ids(4, 20, seed=s) for s in range(2)])


@pytest.mark.parametrize("policy", ["requantize", "calibrate"])
@pytest.mark.parametrize("case", [pytest.param(n, marks=pytest.mark.needs(CASES[n][0])) for n in READERS])
def test_formats_of_a_package(tiny_llama, ids, tmp_path, case, policy):
    result = folded(CASES[case][1](tiny_llama(**SIZES), tmp_path / "base"), policy, ids)
    result.save(tmp_path / "folded")
    if case.startswith("hqq"):
        layers = torch.load(tmp_path / "folded" / "qmodel.pt", weights_only=False)
        stored = {f"{n}.{k}": v for n, state in layers.items() for k, v in state.items()}
    else:
        stored = load_file(tmp_path / "folded" / "model.safetensors")
    config = json.loads((tmp_path / "folded" / "config.json").read_text()).get("quantization_config")
    check(tmp_path / "folded", result.model, READERS[case], config, stored, BOUNDS.get(case, 0.0))


@pytest.mark.needs("gptqmodel", "optimum")
@pytest.mark.parametrize("policy", ["keep", "requantize", "calibrate"])
@pytest.mark.parametrize("kind", ["gptq v1", "gptq v1 sym", "gptq v2", "gptq aten", "awq", "awq aten"])
def test_gptq_and_awq(checkpoint, ids, tmp_path, kind, policy):  # noqa: F811
    """Version, symmetry and order are what the config says, and what the base had."""
    options, _ = KINDS[kind]
    path, _ = checkpoint(**options)
    result = folded(load(path), policy, ids)
    result.save(tmp_path / "folded")
    stored = load_file(tmp_path / "folded" / "model.safetensors")
    config = json.loads((tmp_path / "folded" / "config.json").read_text())["quantization_config"]
    if options["method"] == "gptq":
        assert config["checkpoint_format"] == config["format"] == ("gptq_v2" if "v2" in kind else "gptq")
        assert config["sym"] == options.get("sym", False)
        assert config["desc_act"] == options.get("desc_act", False)
        if policy == "keep":  # what the fold has not touched is what was there, to the bit
            before = load_file(path / "model.safetensors")
            assert all(torch.equal(stored[n], t) for n, t in before.items() if "qzeros" in n)
    reader = published.gptq if options["method"] == "gptq" else published.awq
    check(tmp_path / "folded", result.model, reader, config, stored)


@pytest.mark.needs("gptqmodel", "optimum")
def test_a_zero_that_version_1_cannot_hold(checkpoint, ids, tmp_path):  # noqa: F811
    """Such a model is written as version 2, and says so."""
    path, _ = checkpoint("gptq", version=1, backend="torch")
    base = load(path)
    layer = base.model.layers[1].mlp.up_proj
    layer.qzeros[0, 0] &= ~15
    result = oftfx.fold(randomize(oftfx.transform(base, {"*.q_proj": OFT(16)}), std=0.1), quantized="keep")
    result.save(tmp_path / "folded")
    config = json.loads((tmp_path / "folded" / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "gptq_v2"
    stored = load_file(tmp_path / "folded" / "model.safetensors")
    check(tmp_path / "folded", result.model, published.gptq, config, stored)


@pytest.mark.parametrize("policy", ["requantize", "calibrate"])
def test_fine_grained_float8(tmp_path, policy):
    torch.manual_seed(0)
    layer = format_named("hf_fp8").make_tiny(200, 72)
    model = randomize(oftfx.transform(nn.Sequential(layer), {"0": OFT(8)}), std=0.1)
    result = oftfx.fold(model, quantized=policy, calibration=[(torch.randn(64, 200),)])
    result.save(tmp_path / "folded")
    stored = of_layer(load_file(tmp_path / "folded" / "model.safetensors"), "0")
    made = result.model[0]
    wanted = format_of(made).dequantize(made)
    assert torch.equal(published.with_scale_of_block(stored, {"weight_block_size": made.block_size}), wanted)
