"""Trainable rotations become their blocks."""

import pytest
import torch
import torch.nn as nn

from oftfx import OFT, Rule
from oftfx.errors import PassError
from oftfx.passes import FreezeRotations, InsertRotations, MatchRules, ShareInputs
from tests.passes.programs import IDS, Awkward, fill, program_of, run, said
from tests.reference import dense_block, rel

RULES = [Rule("[qkv]", OFT(4, share_input=True)), Rule("o", OFT(3)), Rule("conv", OFT(9)), Rule("emb", OFT(6))]


def rotated(rules=RULES, adapter="default", program=None, **settings):
    program = program or program_of(Awkward(), IDS)
    return run(run(program, MatchRules(rules), ShareInputs()).program, InsertRotations(adapter, **settings)).program


def blocks(skew, size):
    return torch.stack([dense_block(row, size) for row in skew])


def frozen(model):
    return {n: b for n, b in model.named_buffers() if ".oft." in n}


def test_the_blocks_are_the_cayley_transform_and_the_outputs_stay():
    program = rotated()
    skews = fill(program.model)
    result = run(program, FreezeRotations(), verify=(IDS,))
    assert result.modified
    assert said(result) == dict.fromkeys(["emb", "q", "k", "v", "o", "conv"], ("frozen", "", False))
    assert not [n for n, _ in result.program.model.named_parameters() if "skew" in n]
    found = frozen(result.program.model)
    sizes = {"emb": 6, "q": 4, "o": 3, "conv": 9}
    assert found.keys() == {f"{n}.oft.frozen.blocks" for n in sizes}  # q's is shared
    for name, size in sizes.items():
        assert rel(found[f"{name}.oft.frozen.blocks"], blocks(skews[name], size)) < 1e-6
    with torch.no_grad():
        assert rel(result.program.model(IDS), Awkward()(IDS)) > 1e-2


def test_adapters_in_a_row_are_one_product_where_their_blocks_have_one_size():
    rules = [Rule("o", OFT(3)), Rule("q", OFT(4))]
    program = rotated(rules, "a")
    program = rotated([Rule("o", OFT(3)), Rule("q", OFT(6))], "b", program)
    for module in (program.model.o, program.model.q):
        for hook in module._forward_pre_hooks.values():
            hook.active = ("b", "a")
    skews = fill(program.model, std=0.3)
    result = run(program, FreezeRotations(), verify=(IDS,))
    found = frozen(result.program.model)
    first, second = (blocks(skews[f"o.{n}"], 3) for n in "ba")
    assert rel(first @ second, second @ first) > 1e-2
    assert rel(found.pop("o.oft.frozen.blocks"), first @ second) < 1e-6
    assert found.keys() == {"q.oft.frozen_0.blocks", "q.oft.frozen_1.blocks"}
    for index, (name, size) in enumerate((("q.b", 6), ("q.a", 4))):
        assert rel(found[f"q.oft.frozen_{index}.blocks"], blocks(skews[name], size)) < 1e-6


def test_what_does_not_act_is_removed():
    program = rotated(activate=False)
    fill(program.model)
    result = run(program, FreezeRotations(), verify=(IDS,))
    assert {c.action for c in result.changes} == {"rotation removed: inactive"}
    model = result.program.model
    assert model.state_dict().keys() == Awkward().state_dict().keys()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(model(IDS), Awkward()(IDS))


def test_a_double_rotation_stays_double():
    base = nn.Sequential(nn.Linear(6, 4)).double()
    program = rotated([Rule("0", OFT(3))], program=program_of(base, torch.randn(2, 6).double()))
    (skew,) = fill(program.model).values()
    run(program, FreezeRotations(), verify=(torch.randn(5, 6).double(),))
    (found,) = frozen(base).values()
    assert found.dtype == torch.float64
    assert rel(found, blocks(skew, 3)) < 1e-14


def test_a_model_without_rotations_is_not_modified():
    result = run(program_of(Awkward()), FreezeRotations(), verify=(IDS,))
    assert not result.modified
    assert result.changes == ()


def test_the_post_condition_names_a_rotation_that_is_left():
    class Forgets(FreezeRotations):
        def run(self, program):
            return type(super().run(program_of(Awkward())))(program, False)

    with pytest.raises(
        PassError, match=r"pass freeze_rotations: post-condition failed: emb\.oft\.default is still trai"
    ):
        run(rotated(), Forgets())


def test_it_has_to_come_after_the_rotations():
    program = run(program_of(Awkward(), IDS), MatchRules(RULES), ShareInputs()).program
    with pytest.raises(PassError, match="pass freeze_rotations has to run after insert_rotations"):
        run(program, FreezeRotations(), InsertRotations())
