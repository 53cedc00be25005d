"""The analyses that run by default read calls however they are written, and never fail on what they cannot read."""

import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import oftfx
from oftfx import OFT
from oftfx.trace.labels import LostError, name_of, start, step
from oftfx.trace.record import record
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


# Weights that code uses by itself.


class Uses(nn.Module):
    def __init__(self, use, *shape):
        super().__init__()
        self.w, self.use = nn.Parameter(torch.randn(shape)), use

    def forward(self, x):
        return self.use(x, self.w)


IDS = torch.arange(12).view(2, 6) % 5
USED = {  # how, shape, stored, input
    "linear by keywords": (lambda x, w: F.linear(input=x, weight=w), (6, 8), "rows", X),
    "linear, weight by keyword": (lambda x, w: F.linear(x, weight=w), (6, 8), "rows", X),
    "matmul(x, other=w)": (lambda x, w: torch.matmul(x, other=w), (8, 6), "columns", X),
    "matmul by keywords": (lambda x, w: torch.matmul(input=x, other=w), (8, 6), "columns", X),
    "mm by keywords": (lambda x, w: torch.mm(input=x.flatten(0, 1), mat2=w), (8, 6), "columns", X),
    "x.matmul(other=w)": (lambda x, w: x.matmul(other=w), (8, 6), "columns", X),
    "w.matmul(other=x)": (lambda x, w: w.matmul(other=x.mT), (6, 8), "rows", X),
    "addmm by keywords": (
        lambda x, w: torch.addmm(input=x.new_ones(6), mat1=x[0], mat2=w), (8, 6), "columns", X,
    ),
    "baddbmm by keywords": (
        lambda x, w: torch.baddbmm(input=x.new_ones(1), batch1=x, batch2=w), (2, 8, 4), "experts_columns", X,
    ),
    "transpose by keywords": (lambda x, w: x @ w.transpose(dim0=0, dim1=1), (6, 8), "rows", X),
    "torch.transpose by keywords": (lambda x, w: x @ torch.transpose(input=w, dim0=1, dim1=0), (6, 8), "rows", X),
    "swapaxes by keywords": (lambda x, w: x @ w.swapaxes(axis0=-1, axis1=-2), (6, 8), "rows", X),
    "t by keyword": (lambda x, w: x @ torch.t(input=w), (6, 8), "rows", X),
    "T": (lambda x, w: x @ w.T, (6, 8), "rows", X),
    "mT": (lambda x, w: x @ w.mT, (2, 4, 8), "experts", X),
    "conv1d by keywords": (lambda x, w: F.conv1d(input=x, weight=w), (4, 6, 1), "rows", X),
    "embedding by keywords": (lambda x, w: F.embedding(input=x, weight=w), (5, 8), "rows", IDS),
    "dtype read": (lambda x, w: F.linear(x.to(w).type_as(w), w), (6, 8), "rows", X),
}  # fmt: skip
UNUSED = {
    "swap of other axes by keywords": (lambda x, w: x.mT @ w.transpose(dim0=0, dim1=2), (3, 6, 2), "used by transpose"),
    "swap of other axes": (lambda x, w: x.mT @ w.transpose(0, 2), (3, 6, 2), "used by transpose"),
    "computed axes": (lambda x, w: w.permute(dims=(1, 0)) @ x[0], (6, 5), "used by permute"),
    "twice in one call": (lambda x, w: torch.matmul(w, other=w), (8, 8), "used by matmul"),
    "as bias": (lambda x, w: F.linear(x, torch.ones(8, 8), bias=w[0]), (8, 8), "used by"),
    "several results": (lambda x, w: x @ torch.split(w, 8)[0], (16, 4), "used by split"),
    "returned": (lambda x, w: (F.linear(x, w), w), (6, 8), "the model returns it"),
    "only its dtype": (lambda x, w: x.type_as(w), (6, 8), "not used as an operand"),
    "written to": (lambda x, w: x + w.detach().clone().fill_(2)[0, 0], (6, 8), "used by detach"),
}


@pytest.mark.parametrize("how", USED)
def test_uses_by_keywords_are_read(how):
    use, shape, stored, x = USED[how]
    base = Uses(use, *shape).requires_grad_(False)
    model = oftfx.transform(base, {"w": OFT(2)}, example_inputs=(x,))
    (entry,) = oftfx.adapters(model)["default"]
    assert entry.site.layout.stored == stored
    with torch.no_grad():  # for a weight that needs a gradient torch takes another kernel
        assert torch.equal(model(x), base(x))
    randomize(model, std=0.3)
    assert rel(model(x), base(x)) > 1e-2
    assert rel(oftfx.fold(model).model(x), model(x)) < 1e-6


@pytest.mark.parametrize("how", UNUSED)
def test_uses_without_an_input_axis_are_refused(how):
    use, shape, reason = UNUSED[how]
    with pytest.raises(oftfx.errors.RuleError, match=re.escape(reason)):
        oftfx.plan(Uses(use, *shape), {"w": OFT(2)}, example_inputs=(X,))
