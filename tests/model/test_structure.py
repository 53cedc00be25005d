"""A structural copy is what ``copy.deepcopy`` makes, over the same tensors."""

import copy
import functools
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.model.structure import structural_copy
from tests.reference import randomize


class Odd(nn.Module):
    """Attributes of many kinds, modules with a way of their own to be copied, cycles, shared objects."""

    def __init__(self):
        super().__init__()
        self.a, self.attention, self.lstm = nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.LSTM(4, 4)
        self.same, self.norm = self.a, nn.BatchNorm1d(4)
        self.cache, self.empty, self.order = {"key": [torch.ones(2)]}, {}, OrderedDict()
        self.twice = self.cache
        self.bound = functools.partial(Odd.forward, self)
        self.outside = [self.a]
        self.name, self.count, self.flag = "odd", 3, True
        self.a.register_forward_hook(self.hook)

    def hook(self, module, args, out):
        return out + self.count

    def forward(self, x):
        return self.norm(self.a(x))


def shape(value, seen):
    """A value as nested plain data; a module is a number once it was seen."""
    if isinstance(value, nn.Module):
        if id(value) in seen:
            return seen[id(value)]
        seen[id(value)] = len(seen)
        return type(value), [(k, shape(v, seen)) for k, v in vars(value).items()]
    if isinstance(value, dict):
        return type(value), [(k, shape(v, seen)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [shape(v, seen) for v in value]
    if isinstance(value, functools.partial):
        return shape(value.args, seen)
    if hasattr(value, "__self__"):
        return value.__name__, shape(value.__self__, seen)
    return value if isinstance(value, (bool, int, str)) else type(value)


def test_it_is_a_deepcopy_in_structure_over_the_same_tensors():
    model = Odd()
    copied = structural_copy(model)
    assert shape(copied, {}) == shape(copy.deepcopy(model), {})
    theirs, mine = model.state_dict(), copied.state_dict()
    assert list(mine) == list(theirs)
    assert {n for n in mine if mine[n].data_ptr() != theirs[n].data_ptr()} == {
        n for n in mine if "norm.r" in n or "norm.n" in n
    }


def test_nothing_but_tensors_is_shared():
    model = Odd()
    copied = structural_copy(model)
    assert copied.same is copied.a is copied.outside[0] is not model.a
    assert copied.twice is copied.cache is not model.cache
    assert copied.bound.args == (copied,)
    assert next(iter(copied.a._forward_hooks.values())).__self__ is copied
    assert copied.empty is not model.empty
    assert copied.a._backward_hooks is not model.a._backward_hooks
    copied.a.register_forward_pre_hook(lambda *_: None)
    assert not model.a._forward_pre_hooks
    assert copied.cache["key"][0] is model.cache["key"][0]
    copied.requires_grad_(False)
    assert all(p.requires_grad for p in model.parameters())


def test_a_compiled_call_is_not_the_copys():
    model = Odd().eval()
    model.a.compile(backend="eager")
    copied = structural_copy(model)
    assert copied.a._compiled_call_impl is None
    assert model.a._compiled_call_impl is not None
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(copied(x), model(x))


class Strict(nn.Module):
    """Needs its children when it is put together again, as what torch.compile returns does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __setstate__(self, state):
        super().__setstate__(state)
        self.features = self.inner.weight.shape


@pytest.mark.parametrize("order", ["before", "after", "only"])
def test_a_module_that_needs_its_children_gets_them_whole(order):
    layer = nn.Linear(4, 4)
    holder = nn.Sequential(Strict(layer))
    parts = {"before": [layer, holder], "after": [holder, layer], "only": [holder]}[order]
    copied = structural_copy(nn.ModuleList(parts))
    strict = next(m for m in copied.modules() if isinstance(m, Strict))
    assert strict.features == (4, 4)
    assert strict.inner is not layer
    assert len({m for m in copied.modules() if isinstance(m, nn.Linear)}) == 1


def test_rotations_of_a_copy_are_its_own():
    model = randomize(oftfx.transform(Odd(), {"a": OFT(2)})).eval()
    x = torch.randn(3, 4)
    expected = model(x)
    copied = structural_copy(model)
    oftfx.set_adapter(copied, None)
    assert torch.equal(model(x), expected)
    assert not torch.allclose(copied(x), expected)


def test_memo_tells_what_became_of_an_object():
    model, memo = Odd(), {}
    copied = structural_copy(model, memo)
    assert memo[id(model.a)] is copied.a
    assert memo[id(model.a.weight)] is copied.a.weight
    with open(__file__) as model.file, pytest.raises(oftfx.errors.OftfxError, match="cannot be copied"):
        structural_copy(model)


def test_training_a_copy_leaves_what_a_forward_writes_in_the_original_alone():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(6, 6)
            self.register_buffer("mean", torch.zeros(6))
            self.register_buffer("count", torch.zeros((), dtype=torch.long))
            self.register_buffer("mask", torch.ones(300, 300, dtype=torch.bool))
            self.register_buffer("same", self.mean)

        def forward(self, x):
            y = self.l(x)
            if self.training:
                self.mean.lerp_(y.detach().mean(0), 0.1)
                self.count += 1
            return y - self.mean

    base = Running()
    made = oftfx.transform(base, {"l": oftfx.OFT(3)}).train()
    made(torch.randn(4, 6))
    assert base.mean.norm() == 0
    assert base.count == 0
    assert made.count == 1
    assert made.mean.norm() > 0
    assert made.same is made.mean
    assert made.mask is base.mask


def test_tensors_over_the_same_memory_stay_so():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.l, self.steps, self.past = nn.Linear(6, 6), torch.zeros(()), [torch.zeros(())]
            self.register_buffer("full", torch.ones(6))
            self.register_buffer("head", self.full[:4])
            self.register_buffer("row", self.l.weight.detach()[0])
            self.register_buffer("wide", torch.zeros(1).expand(1000))
            self.full.note = "kept"

        def forward(self, x):
            self.head.mul_(2.0)
            self.steps.add_(1)
            self.past[0].add_(1)
            return self.l(x) * self.full + self.row.sum() + self.steps

    base, x = Views(), torch.randn(3, 6)
    made = oftfx.transform(base, {"l": OFT(3)}, example_inputs=(x,))
    assert (base.head == 1).all()
    assert base.steps == base.past[0] == 0
    out = made(x)
    assert (base.full == 1).all()
    assert base.steps == base.past[0] == 0
    assert torch.equal(out, copy.deepcopy(base)(x))
    assert made.full.note == "kept"
    assert made.wide.untyped_storage().nbytes() == base.wide.untyped_storage().nbytes()
    with torch.no_grad():
        made.l.weight.zero_()
    assert (made.row == 0).all()
