"""Integers in groups saved as GPTQ and as AWQ: the same weights to the bit, by readers of the published layouts."""

import json

import pytest
import torch
from safetensors.torch import load_file

import oftfx
from oftfx import OFT
from oftfx.adapter.integer_layers import integers_of
from oftfx.errors import FoldError
from tests.adapter.kept_models import compressed_base
from tests.ecosystem import published
from tests.ecosystem.test_gptq_awq import checkpoint, load  # noqa: F401  (a fixture)
from tests.ecosystem.test_quantized_checkpoints import quantized_layers
from tests.formats.compressed_model import write_compressed
from tests.reference import randomize

pytestmark = [
    pytest.mark.needs("transformers", "compressed_tensors"),
    pytest.mark.filterwarnings("ignore:.*kernels.*"),
]
SIZES = {"hidden_size": 96, "intermediate_size": 160}


def folded(base, policy="requantize"):
    return oftfx.fold(randomize(oftfx.transform(base, {"*.self_attn.*": OFT(16)}), std=0.1), quantized=policy)


def check(result, directory, reader, **said):
    """Every layer by a reader that knows the files alone; and what the config says."""
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert {k: config[k] for k in said} == said
    stored = load_file(directory / "model.safetensors")
    layers = quantized_layers(result.model)
    assert len(layers) == 14
    for path, weight_format in layers.items():
        part = {k[len(path) + 1 :]: v for k, v in stored.items() if k.startswith(f"{path}.")}
        wanted = weight_format.dequantize(result.model.get_submodule(path)).float()
        assert torch.equal(reader(part, config), wanted), path


def test_symmetric(tiny_llama, tmp_path):
    """compressed-tensors' int4 in both forms, for vLLM as well; biases stay, the model as it is."""
    model = tiny_llama(**SIZES, attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    result = folded(compressed_base(model, tmp_path))
    result.save(tmp_path / "gptq", save_as="gptq", server="vllm")
    result.save(tmp_path / "awq", save_as="awq", server="vllm")
    check(result, tmp_path / "gptq", published.gptq, sym=True, group_size=32, checkpoint_format="gptq", bits=4)
    check(result, tmp_path / "awq", published.awq, group_size=32, modules_to_not_convert=["lm_head"])
    for form in ("gptq", "awq"):
        stored = load_file(tmp_path / form / "model.safetensors")
        key = "model.layers.1.self_attn.q_proj.bias"
        assert torch.equal(stored[key], result.model.state_dict()[key])
    assert result.model.config.quantization_config.quant_method == "compressed-tensors"


@pytest.mark.needs("gptqmodel", "optimum")
def test_zero_points(checkpoint, tmp_path):  # noqa: F811
    """AWQ to asymmetric GPTQ and back: also by the package; vLLM's refusal of the first names the second."""
    path, _ = checkpoint("awq")
    result = folded(load(path), "keep")
    for _, placement in [*oftfx.placement.find.rotated_sites(result.model)]:
        placement.drop()
    with pytest.raises(FoldError, match="has zero points, and it refuses asymmetric GPTQ"):
        result.save(tmp_path / "gptq", save_as="gptq", server="vllm")
    result.save(tmp_path / "gptq", save_as="gptq")
    least = min(
        int(integers_of(p, result.model.get_submodule(p), "").zeros.min()) for p in quantized_layers(result.model)
    )
    check(result, tmp_path / "gptq", published.gptq, sym=False, checkpoint_format="gptq" if least else "gptq_v2")
    again = oftfx.load_folded(tmp_path / "gptq")
    back = oftfx.fold(oftfx.transform(again, {"*.q_proj": OFT(16)}), quantized="keep")
    back.save(tmp_path / "back", save_as="awq", server="vllm")
    check(back, tmp_path / "back", published.awq, group_size=32)
    first, last = (load_file(p / "model.safetensors") for p in (path, tmp_path / "back"))
    assert all(torch.equal(last[k], v) for k, v in first.items() if "proj" in k)


def refused(model, tmp_path, match, form, **options):
    with pytest.raises(FoldError, match=match):
        folded(model).save(tmp_path / "out", save_as=form, **options)
    assert not (tmp_path / "out").exists()


def test_what_has_no_place_there(tiny_llama, tmp_path):
    """By name, with the reason; nothing is written."""
    from transformers import AutoModelForCausalLM

    def made(name, dtype=torch.float16, **options):
        write_compressed(tiny_llama(**SIZES).half(), tmp_path / name, **options)
        return AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=dtype).eval()

    single = made("single", torch.float32, num_bits=4, group_size=32)
    refused(single, tmp_path, "float16, and of these, which are float32, makes another weight", "gptq")
    rows = made("rows", num_bits=4, strategy="channel")
    refused(rows, tmp_path, "each row is one group", "awq")
    folded(rows).save(tmp_path / "rows-gptq", save_as="gptq")
    refused(made("wide", num_bits=8, strategy="channel"), tmp_path, "has 8 bits, AWQ has 4", "awq")
    odd = tiny_llama(hidden_size=96, intermediate_size=164)
    refused(oftfx.quantize(odd.half(), group_size=-1).model, tmp_path, "puts 8 codes or zeros in a word", "gptq")
    some = made("some", num_bits=4, group_size=32)
    model = randomize(oftfx.transform(some, {"*.q_proj": OFT(16)}), std=0.1)
    mixed = oftfx.fold(model, quantized="float")
    with pytest.raises(FoldError, match="q_proj is a float layer among quantized ones"):
        mixed.save(tmp_path / "out", save_as="gptq")
    mixed.save(tmp_path / "mixed", save_as="awq")
    said = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.self_attn.q_proj" in said["modules_to_not_convert"]
    with pytest.raises(FoldError, match="no quantized layer to be saved as GPTQ"):
        folded(tiny_llama(**SIZES), "float").save(tmp_path / "out", save_as="gptq")
