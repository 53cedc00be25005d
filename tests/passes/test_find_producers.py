"""The layer that makes what a site reads: found however the calls are written, and else what is in the way."""

import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import oftfx
from oftfx import OFT, Rule
from oftfx.errors import PassError, RuleError
from oftfx.passes import FindProducers, MatchRules, ShareInputs
from oftfx.trace.labels import LostError, name_of, start, step
from oftfx.trace.record import record
from tests.passes.programs import IDS, Awkward, program_of, run, said
from tests.reference import randomize, rel

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    """``b(between(a(x)))``; ``tell`` makes the result of that and of ``a(x)``."""

    def __init__(self, between, tell=lambda out, y: out):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop, self.same = nn.Dropout(), nn.Identity()
        self.between, self.tell = between, tell
        self.eval().requires_grad_(False)

    def forward(self, x):
        y = self.a(x)
        return self.tell(self.b(self.between(self, y, x)), y)


def heads(y):
    return y.unflatten(-1, (2, 4)).transpose(dim0=1, dim1=2)


def attention(_, y, x):
    return F.scaled_dot_product_attention(query=heads(x), key=heads(x), value=heads(y)).transpose(1, 2).flatten(2)


def weighted(_, y, x):
    weights = torch.softmax(x @ x.transpose(dim0=-2, dim1=-1), dim=-1)
    return torch.matmul(weights, other=y)


FOLLOWED = {
    "attention by keywords": attention,
    "matmul(a, other=b)": weighted,
    "bmm by keywords": lambda m, y, x: torch.bmm(input=torch.softmax(x @ x.mT, -1), mat2=y),
    "mul(x, other=2)": lambda m, y, x: torch.mul(y, other=2),
    "mul by keywords": lambda m, y, x: torch.mul(input=y, other=2.0),
    "div(x, other=2)": lambda m, y, x: y.div(other=2),
    "reshape by keywords": lambda m, y, x: torch.reshape(input=y, shape=(2, 6, 8)),
    "split by keywords": lambda m, y, x: torch.split(tensor=y, split_size_or_sections=6, dim=1)[0],
    "view by keyword": lambda m, y, x: y.view(size=(2, 6, 8)),
    "clone by keyword": lambda m, y, x: torch.clone(input=y),
    "dropout by keyword": lambda m, y, x: F.dropout(input=y, training=False),
    "modules": lambda m, y, x: m.same(m.drop(y)),
    "modules by keyword": lambda m, y, x: m.same(input=m.drop(input=y)),
    "subscript with a slice": lambda m, y, x: y[:, :, 0:],
}
REFUSED = {
    "computed subscript in a tuple": (lambda m, y, x: y[:, x[0, :, 0].argsort()], "index that is computed"),
    "computed shape by keyword": (lambda m, y, x: y.expand_as(other=x), "index that is computed"),
    "view as another dtype": (lambda m, y, x: y.view(torch.int32).view(torch.float32), "view could not be followed"),
    "div that rounds": (lambda m, y, x: torch.div(y, 2, rounding_mode="floor"), "div in the model itself does not"),
    "product with a keyword tensor": (lambda m, y, x: torch.mul(y, other=x), "mul in the model itself does not"),
    "cat": (lambda m, y, x: torch.cat(tensors=(y, x), dim=1)[:, :6], "cat in the model itself does not commute"),
}


@pytest.mark.parametrize("how", FOLLOWED)
def test_data_movement_by_keywords_is_followed(how):
    base = Pair(FOLLOWED[how])
    plan = oftfx.plan(base, {"b": OFT(4)}, example_inputs=(X,))
    assert plan["b"].producer is not None, plan["b"].producer_reason
    model = randomize(oftfx.transform(base, {"b": OFT(4, into="producer")}, example_inputs=(X,)), std=0.3)
    folded = oftfx.fold(model, into="producer").model
    assert rel(folded(X), model(X)) < 1e-6
    assert rel(model(X), base(X)) > 1e-2


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_computed_is_refused_with_a_reason(how):
    between, reason = REFUSED[how]
    plan = oftfx.plan(Pair(between), {"b": OFT(4)}, example_inputs=(X,))
    assert plan["b"].producer is None
    assert reason in plan["b"].producer_reason


@dataclass
class Result:
    out: Any
    states: Any = None


TOLD = {
    "tuple": lambda out, y: (out, y),
    "dict": lambda out, y: {"out": out, "states": [y]},
    "dataclass": Result,
    "object of its own": lambda out, y: SimpleNamespace(out=out, inner=SimpleNamespace(states={"y": (y,)})),
    "moved": lambda out, y: (out, y.transpose(0, 1)[1:]),
    "detached": lambda out, y: (out, y.detach()),
}


@pytest.mark.parametrize("how", TOLD)
def test_a_producer_whose_value_the_model_returns_is_refused(how):
    base = Pair(lambda m, y, x: y, TOLD[how])
    plan = oftfx.plan(base, {"b": OFT(4)}, example_inputs=(X,))
    assert plan["b"].producer_reason == "the model returns the same rows of a"
    result = oftfx.fold(randomize(oftfx.transform(base, {"b": OFT(4)}, example_inputs=(X,))), into="producer")
    assert [s.action for s in result.report] == ["folded"]
    assert torch.equal(result.model.a.weight, base.a.weight)


def test_a_part_of_the_producers_value_that_is_not_turned_may_be_returned():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(4, 8)

        def forward(self, x):
            told, read = self.a(x).split(4, dim=-1)
            return self.b(read), told

    base = Half().eval()
    model = randomize(oftfx.transform(base, {"b": OFT(4, into="producer")}, example_inputs=(X,)), std=0.3)
    folded = oftfx.fold(model, into="producer").model
    assert all(rel(a, b) < 1e-6 for a, b in zip(folded(X), model(X), strict=True))


def test_a_result_that_cannot_be_walked_through_is_no_obstacle():
    loop = []
    loop.append(loop)
    deep = []
    for _ in range(5000):
        deep = [deep]
    base = Pair(lambda m, y, x: y, lambda out, y: (out, loop, deep, len, object(), nn.Identity()))
    plan = oftfx.plan(base, {"b": OFT(4)}, example_inputs=(X,))
    assert (plan.trace.rung, plan["b"].producer.fqn) == ("graph", "a")


class Megatron(nn.Linear):
    """A layer that gives its bias out beside its result."""

    def forward(self, x):
        return F.linear(x, self.weight), self.bias


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.e = Megatron(8, 8), nn.Linear(8, 8), nn.Embedding(5, 8)
        self.never = nn.Linear(8, 8)

    def forward(self, x):
        y, bias = self.a(x)
        return self.b(y) + bias + self.e(x.long() % 5).sum(2)


def test_layers_of_other_kinds_are_named_in_plain_words():
    plan = oftfx.plan(Several(), {"*": OFT(4)}, example_inputs=(X,))
    assert {e.fqn: e.producer_reason for e in plan} == {
        "a": "the model's input x does not commute with a rotation",
        "b": "a gives out several values",
        "e": "only what a linear layer reads can be turned before it, not the output of e (Embedding)",
        "never": "never called in the recorded forward",
    }


def test_an_error_of_ours_in_the_search_is_seen(monkeypatch):
    def fail(*_):
        raise KeyError("val")

    monkeypatch.setattr("oftfx.passes.find_producers.step", fail)
    with pytest.raises(KeyError, match="val"):
        oftfx.plan(Pair(lambda m, y, x: y.contiguous()), {"b": OFT(4)}, example_inputs=(X,))


def test_what_torch_does_not_take_of_labels_is_a_reason():
    graph = record(Pair(lambda m, y, x: y.reshape(-1).new_ones(6).softmax(0) @ y), (X,)).graph
    node = next(n for n in graph.nodes if name_of(n) == "matmul")
    with pytest.raises(LostError, match="matmul could not be followed: "):
        step(node, node.args[1], start(node.args[1]))


def test_a_recording_without_tokens_is_a_reason():
    plan = oftfx.plan(Pair(lambda m, y, x: y.contiguous()), {"b": OFT(4)}, example_inputs=(X[:0],))
    assert plan["b"].producer_reason == "the example inputs hold no token for it"


def test_a_step_by_itself_says_that_it_lost_the_features():
    graph = record(Pair(lambda m, y, x: y.flatten(0, 1).unflatten(0, (2, 6))), (X,)).graph
    nodes = {n.name: n for n in graph.nodes}
    labels = start(nodes["a"])
    flat = step(nodes["flatten"], nodes["a"], labels)
    assert flat.feature.shape == (12, 8)
    with pytest.raises(LostError, match="unflatten could not be followed"):
        step(nodes["unflatten"], nodes["flatten"], labels)  # of another shape
    with pytest.raises(LostError, match="gives out several values"):
        start(graph.call_function(torch.split, (nodes["a"], 4)))


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


# The pass by itself.


def searched(rules, *inputs):
    return run(run(program_of(Awkward(), *inputs), MatchRules(rules), ShareInputs()).program, FindProducers())


def test_every_planned_site_has_a_producer_or_a_reason():
    result = searched([Rule("*", OFT(2, on_indivisible="nearest"))], IDS)
    reasons = {
        "emb": "only what a linear layer reads can be turned before it, not the output of emb (Embedding)",
        "q": "Embedding emb does not commute with a rotation",
        "k": "Embedding emb does not commute with a rotation",
        "v": "Embedding emb does not commute with a rotation",
        "conv": "only what a linear layer reads can be turned before it, not the weight of conv (Conv1d)",
        "head": "getattr in the model itself does not commute with a rotation",
        "never": "never called in the recorded forward",
    }
    assert said(result) == {
        "o": ("can be folded into v", "", False),
        **{name: ("fold into producer", reason, True) for name, reason in reasons.items()},
    }
    assert {e.fqn: e.producer_reason for e in result.program.plan if e.producer is None} == reasons
    assert (result.program.plan["o"].producer.fqn, result.program.plan["o"].producer.starts) == ("v", (0, 2, 4))
    assert result.modified
    again = run(result.program, FindProducers())
    assert not again.modified
    assert again.changes == result.changes


def test_without_a_recording_that_is_the_reason():
    result = searched([Rule("o", OFT(2))])
    assert said(result) == {"o": ("fold into producer", "not recorded", True)}
    assert not result.modified  # it is what a plan starts with


def test_what_asks_for_a_producer_and_has_none_is_an_error_that_lists_all_such_sites():
    pushed = OFT(2, into="producer")
    with pytest.raises(RuleError) as caught:
        searched([Rule("[qko]", pushed)], IDS)
    assert str(caught.value).splitlines() == [
        f"{n}: cannot be folded into a producer: Embedding emb does not commute with a rotation" for n in "qk"
    ]
    assert searched([Rule("o", pushed)], IDS).program.plan["o"].tied_blocks == (0, 1, 2)


def test_it_has_to_come_after_those_whose_plan_it_reads():
    for earlier in (MatchRules([Rule("o", OFT(2))]), ShareInputs()):
        with pytest.raises(PassError, match=f"pass find_producers has to run after {earlier.name}; order given"):
            run(program_of(Awkward(), IDS), FindProducers(), earlier)
