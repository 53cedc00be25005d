"""Rotations that go into the layer before: where that is possible, where not and why, and that it is exact."""

import re

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import RuleError
from tests.reference import dense_rotation, randomize, rel
from tests.zoo.architectures import ARCHITECTURES

# Architecture: how many sites can be pushed at block size 4, one example, and the rows that its blocks turn.
PUSHES = {
    "llama": (2, "model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.v_proj"),
    "gpt2": (2, "transformer.h.0.attn.c_proj", "transformer.h.0.attn.c_attn"),
    "gpt_neox": (2, "gpt_neox.layers.0.attention.dense", "gpt_neox.layers.0.attention.query_key_value"),
    "phi3": (2, "model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.qkv_proj"),
    "gemma2": (2, "model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.v_proj"),
    "bert": (2, "bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.0.attention.self.value"),
    "t5": (6, "decoder.block.1.layer.1.EncDecAttention.o", "decoder.block.1.layer.1.EncDecAttention.v"),
}


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("name", PUSHES)
def test_attention_outputs_go_into_the_values(name):
    count, site, producer = PUSHES[name]
    architecture = ARCHITECTURES[name]
    base, inputs, other = architecture.build(), architecture.example(), architecture.other()
    plan = oftfx.plan(base, {"all-linear": OFT(4, on_indivisible="nearest")}, example_inputs=inputs)
    pushed = {e.fqn: e.producer for e in plan if e.producer}
    assert len(pushed) == count
    assert pushed[site].fqn == producer
    assert all(e.producer_reason for e in plan if not e.producer)
    rules = {n: OFT(4, into="producer") for n in pushed}
    model = randomize(oftfx.transform(base, rules, example_inputs=inputs), std=0.2)
    result = oftfx.fold(model, into="producer", calibration=[inputs])
    assert {s.action for s in result.report} == {"into producer"}
    for n in pushed:
        old, new = model.get_submodule(n).weight, result.model.get_submodule(n).weight
        assert new.data_ptr() == old.data_ptr()
        assert torch.equal(new, base.get_submodule(n).weight)
    with torch.no_grad():
        for batch in (inputs, other):
            outputs = [first(m(**batch)) for m in (base, model, result.model)]
            assert rel(outputs[2], outputs[1]) < 1e-5
            assert rel(outputs[1], outputs[0]) > 1e-2
        assert torch.equal(first(oftfx.unfold(result)(**inputs)), first(model(**inputs)))


def first(out):
    return out if isinstance(out, torch.Tensor) else out[1] if out[0].dim() == 0 else out[0]


@pytest.mark.needs("transformers")
def test_the_turned_rows_are_those_of_dense_algebra(tiny_llama, ids):
    """Four query heads of 16 read two value heads: blocks of 8, one row of skew for both heads of a group."""
    base = tiny_llama(num_hidden_layers=1)
    nn.init.normal_(base.model.layers[0].self_attn.v_proj.bias)
    rules = {"*.o_proj": OFT(8, into="producer"), "*.v_proj": OFT(16)}
    model = randomize(oftfx.transform(base, rules), std=0.2)
    entry = oftfx.adapters(model)["default"]["model.layers.0.self_attn.o_proj"]
    assert entry.producer.starts == (0, 8, 0, 8, 16, 24, 16, 24)
    assert entry.tied_blocks == (0, 1, 0, 1, 2, 3, 2, 3)
    assert (entry.blocks, entry.trainable) == (8, 4 * 28)
    skews = {e.fqn: model.get_parameter(f"{e.fqn}.oft.default.skew").detach() for e in oftfx.adapters(model)["default"]}
    values = "model.layers.0.self_attn.v_proj"
    result = oftfx.fold(model, into="producer")
    assert [s.action for s in result.report] == ["into producer", "folded"]
    old, new = base.get_submodule(values), result.model.get_submodule(values)
    own, pushed = dense_rotation(skews[values], 16), dense_rotation(skews[entry.fqn], 8)
    assert rel(new.weight, pushed.T @ old.weight.double() @ own.T) < 1e-6
    assert rel(new.bias, old.bias.double() @ pushed) < 1e-6
    assert rel(result.model(**ids()).logits, model(**ids()).logits) < 1e-5
    in_place = oftfx.fold(model, into="producer", inplace=True, undo=True)
    assert torch.equal(in_place.model(**ids()).logits, result.model(**ids()).logits)
    restored = oftfx.unfold(in_place)
    assert restored.get_submodule(values).weight is not None
    assert torch.equal(restored.get_submodule(values).weight, old.weight)
    assert torch.equal(restored.get_submodule(values).bias, old.bias)


@pytest.mark.needs("transformers", "peft")
def test_tied_blocks_are_saved_whole_and_load_again(tiny_llama, ids, tmp_path):
    base = tiny_llama()
    rules = {"*.o_proj": OFT(8, into="producer")}
    model = randomize(oftfx.transform(base, rules), std=0.2)
    oftfx.save_adapter(model, tmp_path)
    loaded = oftfx.load_adapter(tiny_llama(), tmp_path)
    assert torch.equal(loaded(**ids()).logits, model(**ids()).logits)
    again = oftfx.load_adapter(oftfx.transform(base, rules), tmp_path)
    assert torch.equal(again(**ids()).logits, model(**ids()).logits)
    free = randomize(oftfx.transform(base, {"*.o_proj": OFT(8)}), std=0.2)
    oftfx.save_adapter(free, tmp_path)
    with pytest.raises(oftfx.errors.AdapterError, match="share their parameters in the model have different numbers"):
        oftfx.load_adapter(oftfx.transform(base, rules), tmp_path)
    # Grouped heads that were trained freely cannot be pushed; they are folded on themselves, and the report says so.
    result = oftfx.fold(free, into="producer")
    assert {s.action for s in result.report} == {"folded"}
    assert all("grouped heads have different rotations" in s.note for s in result.report)
    assert rel(result.model(**ids()).logits, free(**ids()).logits) < 1e-5


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.kind = nn.LayerNorm(8), kind

    def forward(self, x):
        y = self.a(x)
        if self.kind == "plain":
            return self.b(y)
        if self.kind == "moved":
            return self.b(y.flip(-1))
        if self.kind == "scaled":
            return self.b((y * 0.5).contiguous())
        if self.kind == "also read":
            return self.b(y) + y
        if self.kind == "read by another":
            return self.b(y) + self.c(y)
        if self.kind == "norm":
            return self.b(self.norm(y))
        if self.kind == "residual":
            return self.b(x + y)
        if self.kind == "gate":
            return self.b(y * self.c(x))
        return self.b(torch.softmax(y @ y.transpose(-1, -2), dim=-1) @ y)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("plain", None),
        ("scaled", None),
        ("moved", "flip in the model itself does not commute"),
        ("also read", "add in the model itself reads the same rows of a"),
        ("read by another", "Linear c reads the same rows of a"),
        ("norm", "LayerNorm norm does not commute"),
        ("residual", "add in the model itself does not commute"),
        ("gate", "mul in the model itself does not commute"),
        ("self", "transpose in the model itself reads the same rows|matmul in the model itself reads the same rows"),
    ],
)
def test_what_is_in_the_way_is_named(kind, reason):
    base, x = Net(kind), torch.randn(2, 3, 8)
    plan = oftfx.plan(base, {"b": OFT(4)}, example_inputs=(x,))
    if reason is None:
        model = randomize(oftfx.transform(base, {"b": OFT(4, into="producer")}, example_inputs=(x,)), std=0.3)
        folded = oftfx.fold(model, into="producer").model
        assert rel(folded(x), model(x)) < 1e-6
        assert torch.equal(folded.b.weight, base.b.weight)
        return
    assert re.search(reason, plan["b"].producer_reason), plan["b"].producer_reason
    with pytest.raises(RuleError, match="b: cannot be folded into a producer"):
        oftfx.transform(base, {"b": OFT(4, into="producer")}, example_inputs=(x,))


@pytest.mark.needs("transformers")
def test_blocks_over_several_heads_are_refused(tiny_llama):
    plan = oftfx.plan(tiny_llama(), {"*.o_proj": OFT(32)})
    assert "blocks of 32 reach over several heads" in plan.entries[0].producer_reason
