"""Models of compressed-tensors through transformers: their hook, their states, what is written and read back."""

import copy
import json

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file

import oftfx
from oftfx import OFT
from oftfx.errors import FormatError
from oftfx.formats.exact import is_exact
from oftfx.formats.registry import format_named, format_of
from tests.ecosystem.test_quantized_checkpoints import COMPRESSED
from tests.formats.compressed_model import write_compressed
from tests.reference import randomize, rel

pytestmark = pytest.mark.needs("transformers", "accelerate", "compressed_tensors")

INT4 = COMPRESSED["pack-quantized"]


def load(path, dtype=torch.float32, **options):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(path, dtype=dtype, device_map={"": "cpu"}, **options).eval()


@pytest.fixture
def written(tiny_llama, tmp_path):
    def make(**options):
        write_compressed(tiny_llama(intermediate_size=96), tmp_path / "base", **(options or INT4))
        return tmp_path / "base"

    return make


def compressed(model):
    return [m for m in model.modules() if getattr(m, "quantization_status", None) == "compressed"]


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def test_the_hook_that_decompresses_stays_with_the_original(written, ids):
    """Also the layers that are not rotated multiply by what they hold."""
    base = load(written())
    model = oftfx.transform(base, {"*.q_proj": OFT(16)})
    assert hasattr(base, "ct_decompress_hook")
    assert not hasattr(model, "ct_decompress_hook")
    first = logits(model, ids())
    assert len(compressed(model)) == 14
    assert all(map(is_exact, compressed(model)))
    assert len(compressed(base)) == 14
    wanted = logits(base, ids())
    assert len(compressed(base)) == 0  # what its own forward does
    assert rel(first, wanted) < 1e-6
    assert torch.equal(logits(model, ids()), first)


def test_a_copy_of_a_copy_and_another_adapter(written, ids):
    model = randomize(oftfx.transform(load(written()), {"*.q_proj": OFT(16)}))
    other = copy.deepcopy(model)
    oftfx.add_adapter(other, "more", {"*.up_proj": OFT(16)})
    assert torch.equal(logits(other, ids()), logits(model, ids()))
    assert len(compressed(other)) == 14


def test_a_model_that_has_run_already(written, ids, tmp_path):
    """It is decompressed, folds in that state, and the package packs what came out without a change."""
    from compressed_tensors.offload.module import remove_module_offload

    base = load(written())
    logits(base, ids())
    with pytest.raises(FormatError, match="remove_module_offload"):
        oftfx.plan(base, "all-linear")
    for module in base.modules():
        remove_module_offload(module)
    model = randomize(oftfx.transform(base, "all-linear"))
    result = oftfx.fold(model, quantized="requantize")
    assert {s.format for s in result.report} == {"compressed_tensors"}
    wanted = logits(result.model, ids())
    assert rel(wanted, logits(model, ids())) > 1e-3
    result.model.save_pretrained(tmp_path / "wide")
    assert rel(logits(load(tmp_path / "wide"), ids()), wanted) < 1e-6
    packer = result.model.hf_quantizer.compressor
    packer.compress_model(result.model, skip_compressed=True)
    result.model.save_pretrained(tmp_path / "packed")
    packer.update_config(tmp_path / "packed")
    with safe_open(tmp_path / "packed" / "model.safetensors", "pt") as file:
        assert sum(n.endswith("weight_packed") for n in file.keys()) == 14  # noqa: SIM118
    again = load(tmp_path / "packed")
    assert len(compressed(again)) == 14
    assert rel(logits(again, ids()), wanted) < 1e-6


def test_layers_that_became_floats_are_named_in_the_configuration(written, ids, tmp_path):
    model = randomize(oftfx.transform(load(written()), "all-linear"))
    result = oftfx.fold(model, quantized=lambda site: "float" if "q_proj" in site.fqn else "requantize")
    wanted = logits(result.model, ids())
    result.model.save_pretrained(tmp_path / "folded")
    ignored = json.loads((tmp_path / "folded" / "config.json").read_text())["quantization_config"]["ignore"]
    assert sorted(ignored) == ["lm_head", *(f"model.layers.{i}.self_attn.q_proj" for i in range(2))]
    again = load(tmp_path / "folded")
    assert rel(logits(again, ids()), wanted) < 1e-6
    attention = again.model.layers[0].self_attn
    assert format_of(attention.q_proj).name == "dense"
    assert format_of(attention.k_proj).name == "compressed_tensors"
    loaded = oftfx.load_folded(result.save(tmp_path / "saved"), dtype=torch.float32)
    assert rel(logits(loaded, ids()), wanted) < 1e-6
    restored = oftfx.unfold(result)
    assert restored.config.quantization_config.quantization_config.ignore == ["lm_head"]


@pytest.mark.parametrize("case", ["pack-quantized", "nvfp4", "mxfp4", "naive-quantized"])
def test_in_bfloat16_the_folded_file_gives_the_packages_forward_the_same_outputs(written, ids, tmp_path, case):
    """4-bit floats run in nothing else: the package decompresses them to bfloat16 in any model."""
    model = randomize(oftfx.transform(load(written(**COMPRESSED[case]), torch.bfloat16), "all-linear"))
    result = oftfx.fold(model, quantized="requantize")
    wanted = logits(result.model, ids())
    result.model.save_pretrained(tmp_path / "folded")
    again = load(tmp_path / "folded", torch.bfloat16)
    assert len(compressed(again)) == 14
    assert torch.equal(logits(again, ids()), wanted)
    assert len(compressed(again)) == 0


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_zero_points(written, ids, tmp_path):
    """transformers 5.23 refuses any packed zero points of compressed-tensors 0.20, unless it makes floats of them."""
    path = written(**INT4, symmetric=False)
    with pytest.raises(RuntimeError, match="mismatch"):
        load(path)
    known, wanted = format_named("compressed_tensors"), load(path, quantization_config=dequantizing())
    tensors = load_file(path / "model.safetensors")
    layer = known.make_tiny(64, 96, bias=False)
    name = "model.layers.1.mlp.up_proj"
    layer.load_state_dict({k: tensors[f"{name}.{k}"] for k in layer.state_dict()})
    assert torch.equal(known.dequantize(layer), wanted.get_submodule(name).weight)
    known.write(layer, known.requantize(torch.randn(96, 64), layer))
    tensors.update({f"{name}.{k}": v for k, v in layer.state_dict().items()})
    folded = tmp_path / "folded"
    folded.mkdir()
    from safetensors.torch import save_file

    save_file(tensors, folded / "model.safetensors", metadata={"format": "pt"})
    (folded / "config.json").write_text((path / "config.json").read_text())
    again = load(folded, quantization_config=dequantizing())
    assert torch.equal(again.get_submodule(name).weight, known.dequantize(layer))


def dequantizing():
    from transformers import CompressedTensorsConfig

    return CompressedTensorsConfig(dequantize=True)


def test_a_compressed_module_that_nothing_here_reads(written, ids):
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.offload.module import remove_module_offload
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization import initialize_module_for_quantization as initialize

    base = load(written())
    embedding = nn.Embedding(9, 64)
    initialize(embedding, QuantizationScheme(targets=["Embedding"], weights=QuantizationArgs(**INT4)))
    embedding.weight_scale.data.fill_(0.1)
    compress_module(embedding)
    base.add_module("extra", embedding)
    assert len(oftfx.plan(base, {"*.q_proj": OFT(16)})) == 2
    with pytest.raises(FormatError, match=r"extra is compressed, and an embedding.*decompress_model"):
        oftfx.transform(base, {"*.q_proj": OFT(16)}, inplace=True)
    assert hasattr(base, "ct_decompress_hook")
    base.hf_quantizer.compressor.decompress_model(base)
    for module in base.modules():
        remove_module_offload(module)
    model = oftfx.transform(base, {"*.q_proj": OFT(16)})
    assert torch.equal(logits(model, ids()), logits(base, ids()))
