"""Rotations that go into the layer before: where that is possible, where not and why, and that it is exact."""

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT, Rule
from oftfx.errors import PassError
from oftfx.passes import FoldIntoProducers, InsertRotations, MatchRules, ShareInputs
from oftfx.planning.site_plan import Producer
from tests.passes.programs import IDS, Awkward, fill, program_of, run, said
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


# The pass by itself: `Awkward` reads with o what v made.

BLOCKS = {"o": Producer("v", (0, 3)), "q": "emb does not commute"}


def rotated(model, target="[oq]", size=3, **settings):
    planned = run(program_of(model, IDS), MatchRules([Rule(target, OFT(size))]), ShareInputs()).program
    return run(planned, InsertRotations(**settings)).program


def test_one_site_is_pushed_and_the_other_stays_with_its_reason():
    base, program = Awkward(), rotated(Awkward())
    skews = fill(program.model)
    result = run(program, FoldIntoProducers(BLOCKS), verify=(IDS,))
    assert result.modified
    assert said(result) == {
        "q": ("fold into producer", "emb does not commute", True),
        "o": ("fold into producer", "", False),
    }
    model, turn = result.program.model, dense_rotation(skews["o"], 3)
    assert torch.equal(model.o.weight, base.o.weight)
    assert rel(model.v.weight, turn.T @ base.v.weight.double()) < 1e-6
    assert rel(model.v.bias, base.v.bias.double() @ turn) < 1e-6
    assert rel(model.v.weight, base.v.weight) > 1e-2
    assert [n for n, _ in model.named_parameters() if ".oft." in n] == ["q.oft.default.skew"]


def test_rows_that_no_block_turns_stay_bit_for_bit():
    """Blocks of the same rows turn them once."""
    base, program = Awkward(), rotated(Awkward(), "o", 2)
    fill(program.model)
    skew = program.model.o.oft.default.skew
    skew.data[2] = skew.data[0]
    run(program, FoldIntoProducers({"o": Producer("v", (4, 0, 4))}))
    turn = dense_rotation(skew.detach()[[0, 1]], 2)
    assert torch.equal(program.model.v.weight[2:4], base.v.weight[2:4])
    rows = torch.tensor([4, 5, 0, 1])
    assert rel(program.model.v.weight[rows], turn.T @ base.v.weight[rows].double()) < 1e-6


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def test_whatever_cannot_be_exact_is_refused_and_nothing_changes():
    def refused(model, producer=BLOCKS["o"], prepare=lambda model: None, **settings):
        program = rotated(model, "o", **settings)
        fill(program.model)
        prepare(program.model)
        before = program.fingerprint()
        result = run(program, FoldIntoProducers({} if producer is None else {"o": producer}), verify=(IDS,))
        assert not result.modified
        assert program.fingerprint() == before
        (change,) = result.refusals
        return change.reason

    assert refused(Awkward(), None) == "not recorded"
    assert refused(Awkward(), activate=False) == "no rotation acts here"
    shared = "grouped heads have different rotations; train with OFT(into='producer') (v)"
    assert refused(Awkward(), Producer("v", (0, 0))) == shared
    own = Awkward()
    own.v = Own(12, 6)
    assert refused(own) == "its producer v (Own) has a forward of its own"
    unknown = Awkward()
    unknown.v = nn.utils.parametrizations.weight_norm(nn.Linear(12, 6))
    assert refused(unknown) == "its producer v is stored by no known format, where turned rows would be rounded"

    def second(model):
        program = run(program_of(model, IDS), MatchRules([Rule("o", OFT(2))]), ShareInputs()).program
        run(program, InsertRotations("other", activate=False))
        (hook,) = model.o._forward_pre_hooks.values()
        hook.active = ("default", "other")
        fill(model)

    assert refused(Awkward(), prepare=second) == "several rotations of different block sizes act here"


@pytest.mark.needs("bitsandbytes")
def test_rows_of_a_quantized_producer_are_not_turned():
    from oftfx.formats.registry import format_named

    model = nn.Sequential(format_named("bnb4").make_tiny(64, 6), nn.Linear(6, 4))
    program = run(run(program_of(model), MatchRules([Rule("1", OFT(3))])).program, InsertRotations()).program
    fill(model)
    result = run(program, FoldIntoProducers({"1": Producer("0", (0, 3))}))
    reason = "its producer 0 is stored as bnb4, where turned rows would be rounded"
    assert said(result) == {"1": ("fold into producer", reason, True)}


def test_it_has_to_come_after_the_rotations():
    program = run(program_of(Awkward(), IDS), MatchRules([Rule("o", OFT(3))]), ShareInputs()).program
    with pytest.raises(PassError, match="pass fold_into_producers has to run after insert_rotations"):
        run(program, FoldIntoProducers(BLOCKS), InsertRotations())
