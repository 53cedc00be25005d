"""Folded models written and read by each format's own functions: the same bytes, the same logits."""

import json

import pytest
import torch
import torch.nn as nn
from safetensors.torch import save_file

import oftfx
from oftfx import OFT
from oftfx.formats.registry import format_of
from tests.formats.compressed_model import write_compressed
from tests.reference import dense_rotation, randomize, rel

pytestmark = [pytest.mark.needs("transformers", "accelerate"), pytest.mark.filterwarnings("ignore:.*kernels.*")]


def from_pretrained(path, **options):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, device_map={"": "cpu"}, **options).eval()


def save_pretrained(model, path):
    model.save_pretrained(path)


def quantized_by(config):
    """A maker that quantizes while transformers loads."""

    def make(float_model, path):
        float_model.save_pretrained(path)
        return from_pretrained(path, quantization_config=config())

    return make


def four_bits(double):
    def config():
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip

    return config


def eight_bits():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def torchao_int8():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def hqq_of(bits, axis):
    def make(float_model, path):
        from hqq.core.quantize import BaseQuantizeConfig
        from hqq.models.hf.base import AutoHQQHFModel

        config = BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)
        options = {"compute_dtype": torch.float32, "device": "cpu"}
        AutoHQQHFModel.quantize_model(float_model, quant_config=config, **options)
        return float_model.eval()

    return make


def save_hqq(model, path):
    from hqq.models.hf.base import AutoHQQHFModel

    AutoHQQHFModel.save_quantized(model, str(path))


def load_hqq(path):
    from hqq.models.hf.base import AutoHQQHFModel

    return AutoHQQHFModel.from_quantized(str(path), compute_dtype=torch.float32, device="cpu").eval()


def aqlm_of(books, bits, high):
    """A checkpoint written by hand: the package has no quantizer. Codes and books are random, of the right size."""

    def make(float_model, path):
        from aqlm import QuantizedLinear

        options = {
            "in_group_size": 8, "out_group_size": high, "num_codebooks": books, "nbits_per_codebook": bits,
        }  # fmt: skip
        tensors, generator = {}, torch.Generator().manual_seed(4)
        for name, layer in float_model.named_modules():
            if not isinstance(layer, nn.Linear) or name == "lm_head":
                continue
            other = QuantizedLinear(layer.in_features, layer.out_features, bias=layer.bias is not None, **options)
            shape = other.codes.shape
            top = 2 ** (bits - 1)
            tensors[f"{name}.codes"] = torch.randint(-top, top, shape, generator=generator).to(other.codes.dtype)
            size = layer.weight.std().item() / books**0.5
            tensors[f"{name}.codebooks"] = torch.randn(other.codebooks.shape, generator=generator) * size
            tensors[f"{name}.scales"] = torch.rand(other.scales.shape, generator=generator) + 0.5
        kept = {n: t for n, t in float_model.state_dict().items() if f"{n[:-7]}.codes" not in tensors}
        path.mkdir()
        save_file({**kept, **tensors}, path / "model.safetensors", metadata={"format": "pt"})
        note = {"quant_method": "aqlm", **options, "linear_weights_not_to_quantize": ["lm_head"]}
        config = {**float_model.config.to_dict(), "quantization_config": note, "architectures": ["LlamaForCausalLM"]}
        (path / "config.json").write_text(json.dumps(config, default=str))
        return from_pretrained(path)

    return make


def compressed_to(**options):
    """A checkpoint as llm-compressor writes it."""

    def make(float_model, path):
        write_compressed(float_model, path, **options)
        return from_pretrained(path)

    return make


ROUNDED = {"num_bits": 8, "strategy": "token", "dynamic": True}
FLOAT4 = {"num_bits": 4, "type": "float"}
COMPRESSED = {
    "pack-quantized": {"num_bits": 4, "group_size": 32},
    "int-quantized": {"num_bits": 8, "strategy": "channel", "inputs": ROUNDED},
    "float-quantized": {"num_bits": 8, "type": "float", "strategy": "channel", "inputs": ROUNDED | {"type": "float"}},
    "naive-quantized": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 48]},
    "nvfp4": FLOAT4 | {"strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn},
    "mxfp4": FLOAT4 | {"group_size": 32, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8},
}
CASES = {
    "nf4": ("bitsandbytes", quantized_by(four_bits(False)), save_pretrained, from_pretrained),
    "nf4, double": ("bitsandbytes", quantized_by(four_bits(True)), save_pretrained, from_pretrained),
    "int8": ("bitsandbytes", quantized_by(eight_bits), save_pretrained, from_pretrained),
    "hqq 4 bit": ("hqq", hqq_of(4, 1), save_hqq, load_hqq),
    "hqq 3 bit, axis 0": ("hqq", hqq_of(3, 0), save_hqq, load_hqq),
    "torchao int8": ("torchao", quantized_by(torchao_int8), save_pretrained, from_pretrained),
    "aqlm 2x6": ("aqlm", aqlm_of(2, 6, 1), save_pretrained, from_pretrained),
    "aqlm 1x6, two rows": ("aqlm", aqlm_of(1, 6, 2), save_pretrained, from_pretrained),
    "aqlm 2x8": ("aqlm", aqlm_of(2, 8, 1), save_pretrained, from_pretrained),
    **{
        name: ("compressed_tensors", compressed_to(**options), save_pretrained, from_pretrained)
        for name, options in COMPRESSED.items()
    },
}
SIZES = {"intermediate_size": 128}
"""Rows are whole blocks: bitsandbytes' CPU kernel misreads others."""
RUNTIME = {"int8": 2e-2, "aqlm 2x8": None, "int-quantized": 2e-2, "float-quantized": 5e-2, "nvfp4": None, "mxfp4": None}
"""What a format's own eval forward costs; None where it cannot be relied on: its threads race, or it is in bfloat16."""


def quantized_layers(model):
    found = {n: format_of(m) for n, m in model.named_modules()}
    return {n: f for n, f in found.items() if f is not None and not f.lossless}


def assert_same_weights(model, expected):
    layers = quantized_layers(expected)
    assert len(layers) == 14
    assert quantized_layers(model) == layers
    for name, weight_format in layers.items():
        got, wanted = (weight_format.dequantize(m.get_submodule(name)) for m in (model, expected))
        assert torch.equal(got, wanted), name


def rotated_twin(twin, model):
    """The float model with the weights that the quantized one stands for, rotated densely."""
    for entry in oftfx.adapters(model)["default"]:
        layer = model.get_submodule(entry.fqn)
        skew = model.get_parameter(f"{entry.owner}.oft.default.skew").detach()
        weight = format_of(layer).dequantize(layer).double() @ dense_rotation(skew, entry.block_size, entry.blocks).T
        twin.get_submodule(entry.fqn).weight.data = weight.float()
    return twin


@pytest.mark.parametrize("policy", ["requantize", "calibrate"])
@pytest.mark.parametrize("case", [pytest.param(n, marks=pytest.mark.needs(c[0])) for n, c in CASES.items()])
def test_a_folded_model_survives_its_formats_own_file(tiny_llama, ids, tmp_path, case, policy):
    _, make, save, load = CASES[case]
    bound = RUNTIME.get(case, 1e-5)
    base = make(tiny_llama(**SIZES), tmp_path / "base")
    model = randomize(oftfx.transform(base, {"all-linear": OFT(16)}), std=0.1)
    assert sum(e.fqn in quantized_layers(model) for e in oftfx.adapters(model)["default"]) == 14
    wanted = rotated_twin(tiny_llama(**SIZES), model)(**ids()).logits
    assert rel(model(**ids()).logits, wanted) < (bound or 1e-5)
    batches = [ids(4, 20, seed=s) for s in range(3)]
    result = oftfx.fold(model, quantized=policy, calibration=batches)
    action = {"requantize": "requantized", "calibrate": "calibrated"}[policy]
    assert {s.action for s in result.report if s.format != "dense"} == {action}
    folded = result.model
    logits = folded(**ids()).logits  # also a forward before the file is written
    limit = 0.05 if "int" in case else 1.0
    assert 1e-4 < rel(logits, wanted) < limit
    assert not any(".oft." in n for n in folded.state_dict())
    save(folded, tmp_path / "folded")
    again = load(tmp_path / "folded")
    assert_same_weights(again, folded)
    if bound is not None:
        assert rel(again(**ids()).logits, logits) < bound
    restored = oftfx.unfold(result)
    assert rel(restored(**ids()).logits, wanted) < (bound or 1e-5)


OPTIONS = {"transformers": {"dtype": torch.float32, "device_map": {"": "cpu"}}, "hqq": {"device": "cpu"}}
"""What `from_pretrained` above is given as well."""


@pytest.mark.parametrize("policy", ["keep", "float", "requantize"])
@pytest.mark.parametrize("case", [pytest.param(n, marks=pytest.mark.needs(c[0])) for n, c in CASES.items()])
def test_a_folded_directory_brings_every_policy_back(tiny_llama, ids, tmp_path, case, policy):
    """And is folded and saved again, as what was read from a quantized file may be another thing to its loader."""
    base = CASES[case][1](tiny_llama(**SIZES), tmp_path / "base")
    model = randomize(oftfx.transform(base, {"all-linear": OFT(16)}), std=0.1)
    wanted = rotated_twin(tiny_llama(**SIZES), model)(**ids()).logits
    result = oftfx.fold(model, quantized=policy)
    result.save(tmp_path / "folded")
    way = json.loads((tmp_path / "folded" / "oftfx_fold.json").read_text())["way"]
    again = oftfx.load_folded(tmp_path / "folded", **OPTIONS[way])
    if policy == "float":
        assert not quantized_layers(again)
    else:
        assert_same_weights(again, result.model)
    bound = RUNTIME.get(case, 1e-5)
    with torch.no_grad():
        logits = result.model(**ids()).logits
        if bound is not None:
            assert rel(again(**ids()).logits, logits) < bound
        if policy != "requantize":
            assert rel(again(**ids()).logits, wanted) < (bound or 1e-5)
    if policy == "keep":
        second = oftfx.fold(randomize(oftfx.transform(again, {"*.q_proj": OFT(16)}), std=0.1))
        second.save(tmp_path / "second")
        third = oftfx.load_folded(tmp_path / "second", **OPTIONS[way])
        assert_same_weights(third, again)
        with torch.no_grad():
            assert rel(third(**ids()).logits, second.model(**ids()).logits) < (bound or 1e-5)
            assert rel(third(**ids()).logits, logits) > 1e-3


@pytest.mark.parametrize("case", [pytest.param(n, marks=pytest.mark.needs(c[0])) for n, c in CASES.items()])
def test_calibrated_checkpoints_are_nearer_than_rounded_ones(tiny_llama, ids, tmp_path, case):
    """Of the layers' own outputs; all of them, on tokens that were not seen."""
    base = CASES[case][1](tiny_llama(**SIZES), tmp_path / "base")
    model = randomize(oftfx.transform(base, {"all-linear": OFT(16)}), std=0.1)
    batches = [ids(8, 40, seed=s) for s in range(4)]
    errors = {}
    for policy in ("requantize", "calibrate"):
        result = oftfx.fold(model, quantized=policy, calibration=batches)
        with torch.no_grad():
            errors[policy] = rel(result.model(**ids(8, 40, seed=9)).logits, model(**ids(8, 40, seed=9)).logits)
    # llm.int8 rounds the activations as well, which costs as much as its weights.
    assert errors["calibrate"] < (1.0 if case == "int8" else 0.9) * errors["requantize"]
