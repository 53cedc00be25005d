"""Quantized layers saved as compressed-tensors: the same weights to the bit, by the package and by a reader of ours."""

import json

import pytest
import torch
from safetensors.torch import load_file

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterFileError, FoldError
from oftfx.formats.registry import format_of
from tests.ecosystem.test_gptq_awq import checkpoint, load  # noqa: F401  (a fixture)
from tests.ecosystem.test_quantized_checkpoints import CASES, quantized_layers
from tests.reference import randomize, rel

pytestmark = [
    pytest.mark.needs("transformers", "compressed_tensors", "gptqmodel", "optimum"),
    pytest.mark.filterwarnings("ignore:.*kernels.*"),
]
GPTQ = {"method": "gptq", "backend": "torch"}
KINDS = {
    "gptq asymmetric": GPTQ | {"version": 1},
    "gptq symmetric": GPTQ | {"version": 1, "sym": True},
    "gptq v2": GPTQ | {"version": 2},
    "awq": {"method": "awq"},
}


def folded(base, policy, ids):
    model = randomize(oftfx.transform(base, {"*.self_attn.*": OFT(16)}), std=0.1).eval()
    return oftfx.fold(model, quantized=policy, calibration=[ids(4, 20, seed=s) for s in range(2)])


def read(stored, path, scheme):
    """A weight, by the published layout."""
    part = {k[len(path) + 1 :]: v for k, v in stored.items() if k.startswith(f"{path}.")}
    per = 32 // scheme["num_bits"]
    unpacked = lambda words: torch.stack(  # noqa: E731
        [(words.long() >> (scheme["num_bits"] * i)) & (2 ** scheme["num_bits"] - 1) for i in range(per)], -1
    ).flatten(-2)
    rows, columns = part["weight_shape"].tolist()
    codes, scale = unpacked(part["weight_packed"])[:, :columns], part["weight_scale"]
    zero = torch.full(scale.shape, 2 ** (scheme["num_bits"] - 1))
    if not scheme["symmetric"]:
        zero = unpacked(part["weight_zero_point"].T).T[:rows]
    size = columns // scale.shape[1]
    zero, scale = zero.repeat_interleave(size, 1), scale.repeat_interleave(size, 1)
    return ((codes - zero).to(scale.dtype) * scale).float()


def check(result, directory, symmetric, bits=4):
    """The layout by the reader above; returns scheme and config."""
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert (group["weights"]["symmetric"], group["weights"]["num_bits"]) == (symmetric, bits)
    assert config["ignore"] == ["lm_head"]
    stored = load_file(directory / "model.safetensors")
    layers = quantized_layers(result.model)
    assert len(layers) == 14
    for path, weight_format in layers.items():
        wanted = weight_format.dequantize(result.model.get_submodule(path)).float()
        assert torch.equal(read(stored, path, group["weights"]), wanted), path


def check_loaded(result, directory):
    """By the package, whose products are in the dtype that it was loaded in."""
    loaded = oftfx.load_folded(directory)
    layers = quantized_layers(result.model)
    assert quantized_layers(loaded).keys() == layers.keys()
    for path, weight_format in layers.items():
        here, there = loaded.get_submodule(path), result.model.get_submodule(path)
        assert format_of(here).name == "compressed_tensors"
        assert rel(format_of(here).dequantize(here).float(), weight_format.dequantize(there).float()) < 5e-4, path


@pytest.mark.parametrize("policy", ["requantize", "calibrate"])
@pytest.mark.parametrize("kind", KINDS)
def test_integers_in_groups(checkpoint, ids, tmp_path, kind, policy):  # noqa: F811
    """Layers with and without a rotation, symmetric as the fold left them; the model stays as it is."""
    path, _ = checkpoint(**KINDS[kind])
    result = folded(load(path), policy, ids)
    before = {k: v.clone() for k, v in result.model.state_dict().items()}
    symmetric = kind == "gptq symmetric"
    if not symmetric:
        with pytest.raises(FoldError, match="zero points, which transformers does not read"):
            result.save(tmp_path / "packed", save_as="compressed-tensors")
    result.save(tmp_path / "packed", save_as="compressed-tensors", server=None if symmetric else "vllm")
    assert all(torch.equal(v, before[k]) for k, v in result.model.state_dict().items())
    assert result.model.config.quantization_config.quant_method == KINDS[kind]["method"]
    check(result, tmp_path / "packed", symmetric)
    if symmetric:
        check_loaded(result, tmp_path / "packed")
    else:
        with pytest.raises(AdapterFileError, match="was saved for vLLM"):
            oftfx.load_folded(tmp_path / "packed")


@pytest.mark.needs("bitsandbytes")
def test_rows_of_eight_bits(tiny_llama, ids, tmp_path):
    base = CASES["int8"][1](tiny_llama(intermediate_size=128), tmp_path / "base")
    result = folded(base, "requantize", ids)
    result.save(tmp_path / "packed", save_as="compressed-tensors")
    check(result, tmp_path / "packed", symmetric=True, bits=8)
    check_loaded(result, tmp_path / "packed")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("act-order", "act-order"), ("aqlm 2x6", "no code of its own"), ("float-quantized", "are no integers")],
)
def test_what_has_no_place_there(checkpoint, tiny_llama, ids, tmp_path, kind, reason):  # noqa: F811
    if kind == "act-order":
        base = load(checkpoint(**GPTQ, version=1, desc_act=True)[0])
    else:
        base = CASES[kind][1](tiny_llama(intermediate_size=128), tmp_path / "base")
    result = folded(base, "requantize", ids)
    with pytest.raises(FoldError, match=reason):
        result.save(tmp_path / "packed", save_as="compressed-tensors")
    assert not (tmp_path / "packed").exists()


def test_what_vllm_reads(checkpoint, tiny_llama, ids, tmp_path):  # noqa: F811
    """Said before a byte is written, with what it reads instead."""
    path, _ = checkpoint(**KINDS["gptq asymmetric"])
    model = randomize(oftfx.transform(load(path), {"*.self_attn.*": OFT(16)}), std=0.1)
    result = oftfx.fold(model, quantized="requantize")
    with pytest.raises(FoldError, match="refuses asymmetric GPTQ; save_as='compressed-tensors' "):
        result.save(tmp_path / "out", server="vllm")
    assert not (tmp_path / "out").exists()
    result.save(tmp_path / "out", server="vllm", save_as="compressed-tensors")
    with pytest.raises(FoldError, match="has a rotation in front of it"):
        oftfx.fold(model, quantized="keep").save(tmp_path / "kept", server="vllm")
    every = randomize(oftfx.transform(load(path), {"all-linear": OFT(16)}), std=0.1)
    oftfx.fold(every, quantized="float").save(tmp_path / "floats", server="vllm")
    with pytest.raises(FoldError, match="known: 'vllm'"):
        result.save(tmp_path / "other", server="other")
    with pytest.raises(FoldError, match="save_as='gguf'"):
        result.save(tmp_path / "other", save_as="gguf")
    path.rename(tmp_path / "first")
    act = load(checkpoint(**GPTQ, version=1, sym=True, desc_act=True)[0])
    model = randomize(oftfx.transform(act, {"*.q_proj": OFT(16)}), std=0.1)
    with pytest.raises(FoldError, match="refuses act-order"):
        oftfx.fold(model, quantized="requantize").save(tmp_path / "act", server="vllm")
    hqq = CASES["aqlm 2x6"][1](tiny_llama(intermediate_size=128), tmp_path / "aqlm")
    with pytest.raises(FoldError, match="does not read aqlm"):
        folded(hqq, "requantize", ids).save(tmp_path / "aqlm-out", server="vllm")
