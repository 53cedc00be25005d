"""gpt-oss: its 4-bit experts are read as floats, and a fold of these is a checkpoint that transformers reads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import oftfx
from oftfx import OFT
from oftfx.formats.packing.float4_codes import from_exponents, from_nibbles, to_exponents, to_nibbles
from oftfx.grids import Float4, Grid, Partition
from tests.reference import randomize, rel

pytestmark = [pytest.mark.needs("transformers", "accelerate"), pytest.mark.filterwarnings("ignore:.*kernels.*")]

NAMES = ("gate_up_proj", "down_proj")


def packed(weight):
    """Blocks and scales of experts ``(experts, in, out)``, as the published checkpoints have them."""
    experts, inner, outer = weight.shape
    rows = weight.transpose(1, 2).reshape(-1, inner)
    grid = Grid(Partition.tiles(tuple(rows.shape), (1, 32)), Float4(), round_scale=lambda s: 2.0 ** s.log2().ceil())
    coded = grid.fit(rows)
    blocks = to_nibbles(coded.codes).view(experts, outer, inner // 32, 16)
    return blocks, to_exponents(coded.scale).view(experts, outer, inner // 32), grid.values(coded)


@pytest.fixture
def written(tmp_path):
    """A tiny checkpoint, and the values of its experts ``(experts, out, in)``."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, head_dim=16, layer_types=["full_attention"],
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors, values = load_file(file), {}
    for name in NAMES:
        path = f"model.layers.0.mlp.experts.{name}"
        weight = tensors.pop(path)
        tensors[f"{path}_blocks"], tensors[f"{path}_scales"], found = packed(weight)
        values[path] = found.view(len(weight), -1, weight.shape[1])
    save_file(tensors, file, metadata={"format": "pt"})
    note = json.loads((tmp_path / "base" / "config.json").read_text())
    note["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": None}
    (tmp_path / "base" / "config.json").write_text(json.dumps(note))
    return tmp_path / "base", values


def test_read_as_floats_folded_and_written(written, ids, tmp_path):
    from transformers import GptOssForCausalLM, Mxfp4Config

    path, values = written
    tensors = load_file(path / "model.safetensors")
    base = GptOssForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    ).eval()
    for name, wanted in values.items():
        assert torch.equal(base.get_parameter(name).transpose(1, 2), wanted)
        scale = from_exponents(tensors[f"{name}_scales"]).unsqueeze(-1)
        read = Float4().decode(from_nibbles(tensors[f"{name}_blocks"])) * scale
        assert torch.equal(read.flatten(2), wanted)
    model = randomize(oftfx.transform(base, {"*.experts.*_proj": OFT(16), "*.q_proj": OFT(16)}), std=0.2)
    result = oftfx.fold(model)
    assert [s.action for s in result.report] == ["folded"] * 3
    with torch.no_grad():
        wanted = model(**ids()).logits
        assert rel(result.model(**ids()).logits, wanted) < 5e-6
        assert rel(base(**ids()).logits, wanted) > 1e-2
        again = oftfx.load_folded(result.save(tmp_path / "folded"), dtype=torch.float32)
        assert torch.equal(again(**ids()).logits, result.model(**ids()).logits)
    assert not any(n.endswith(("_blocks", "_scales")) for n in load_file(tmp_path / "folded" / "model.safetensors"))
