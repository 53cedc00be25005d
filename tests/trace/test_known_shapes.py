"""Shortcuts of the recording give the shapes that running the layers gives."""

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.trace.known_shapes import is_bare_linear, kind_of_call
from oftfx.trace.record import record


def shapes(model, inputs):
    graph = record(model, inputs).graph
    known = [n.meta.get("value") for n in graph.nodes]
    assert len([v for v in known if v is not None and v.requires_grad and not v.is_leaf]) > 10
    return [(n.op, str(n.target)) for n in graph.nodes], known


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_recording_with_shortcuts_is_the_one_without(kind, tiny_llama, tiny_bert, ids, monkeypatch):
    model = (tiny_llama if kind == "llama" else tiny_bert)()
    model = oftfx.transform(model, {"*.0.*": OFT(8, on_indivisible="nearest")})
    short = shapes(model, ids())
    monkeypatch.setattr("oftfx.trace.known_shapes.is_bare_linear", lambda *_: False)
    monkeypatch.setattr("oftfx.trace.known_shapes.kind_of_call", lambda *_: None)
    assert shapes(model, ids()) == short


class Noting(nn.Module):
    """A layer that keeps something of its call, as some attentions do."""

    def __init__(self):
        super().__init__()
        self.seen = None

    def forward(self, x):
        self.seen = x.shape[0]
        return x * 2


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = Noting(), Noting(), nn.Linear(4, 4)

    def forward(self, x):
        y = self.b(self.a(x))
        return self.out(y) if self.b.seen is None else self.out(y) + self.b.seen


def test_layers_that_note_something_on_themselves_all_run():
    graph = record(Reads(), (torch.randn(3, 4),)).graph
    assert [n.args[1] for n in graph.nodes if "add" in str(n.target)] == [3]


def test_only_torchs_own_linear_is_taken_for_one():
    class Mine(nn.Linear):
        def forward(self, x):
            return super().forward(x).sum(-1)

    x = torch.randn(3, 5)
    assert is_bare_linear(nn.Linear(5, 2), x)
    assert not is_bare_linear(Mine(5, 2), x)
    assert not is_bare_linear(nn.Linear(4, 2), x)
    assert not is_bare_linear(nn.Linear(5, 2).double(), x)
    hooked = nn.Linear(5, 2)
    hooked.register_forward_pre_hook(lambda m, a: (a[0][:1],))
    assert not is_bare_linear(hooked, x)
    patched = nn.Linear(5, 2)
    patched.forward = lambda x: x
    assert not is_bare_linear(patched, x)
    with torch.autocast("cpu"):
        assert not is_bare_linear(nn.Linear(5, 2), x)


def test_calls_are_of_one_kind_only_where_nothing_differs_that_could_change_a_shape():
    x = torch.randn(2, 6)
    assert kind_of_call(nn.LayerNorm(6), x) == kind_of_call(nn.LayerNorm(6), x) is not None
    different = [
        kind_of_call(nn.Unflatten(1, (2, 3)), x),
        kind_of_call(nn.Unflatten(1, (3, 2)), x),
        kind_of_call(nn.LayerNorm(6), x),
        kind_of_call(nn.LayerNorm(6, eps=1e-3), x),
        kind_of_call(nn.LayerNorm(6), torch.randn(3, 6)),
        kind_of_call(nn.LayerNorm(6).eval(), x),
        kind_of_call(nn.LayerNorm(6), x.double()),
        kind_of_call(nn.GLU(0), x),
        kind_of_call(nn.GLU(1), x),
    ]
    known = [k for k in different if k is not None]
    assert len(set(map(str, known))) == len(known) >= 7
    with_code = nn.Identity()
    with_code.function = torch.relu
    assert kind_of_call(with_code, x) is None
    with_hook = nn.LayerNorm(6)
    with_hook.register_forward_hook(lambda m, a, o: o[:1])
    assert kind_of_call(with_hook, x) is None
