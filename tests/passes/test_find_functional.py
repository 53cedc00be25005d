"""Weights that code uses by itself: how they are stored is read off the calls, however these are written."""

import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import oftfx
from oftfx import OFT
from oftfx.passes import FindFunctional
from oftfx.planning.program import Program
from oftfx.trace.record import record_best
from tests.passes.programs import run, said
from tests.reference import randomize, rel

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


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


# The pass by itself.


class Mixed(nn.Module):
    """A parameter on its own, a layer that is only read, one that is called and read, and one with two names."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 6))
        self.read, self.both, self.called = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.one, self.two = nn.Linear(3, 5, bias=False), nn.Linear(3, 5, bias=False)
        self.two.weight = self.one.weight
        self.mask = nn.Parameter(torch.randn(8, 8))
        self.eval()

    def forward(self, x):
        y = F.linear((x * self.mask[0]) @ self.w, self.read.weight)
        y = self.called(self.both(y) @ self.both.weight)
        return F.linear(y, self.one.weight)


def looked(model):
    return Program.of(model, record_best(model, (X,), look_into={model}))


def test_reads_become_sites_or_reasons():
    program = looked(Mixed())
    assert [s.fqn for s in program.sites] == ["read", "both", "called", "one", "two"]
    result = run(program, FindFunctional())
    names = "its weight has several names (one.weight, two.weight) and is read by code in the model itself, by any of"
    assert said(result) == {
        "w": ("read by the model itself", "", False),
        "read": ("read by the model itself", "", False),
        "both": (
            "not a site",
            "its weight is also read by other code (in the model itself), which a rotation would not reach",
            True,
        ),
        "one": ("not a site", f"{names} them", True),
        "two": ("not a site", f"{names} them", True),
        "mask": ("not a site", "it is used by getitem in the model itself, where no axis is its input", True),
    }
    found = {s.fqn: s for s in result.program.sites}
    assert list(found) == ["w", "read", "called"]
    assert (found["w"].in_features, found["w"].out_features, found["w"].layout.stored) == (8, 6, "columns")
    assert (found["read"].in_features, found["read"].is_layer) == (6, False)
    assert found["called"].is_layer
    assert result.program.refused == {c.site: c.reason for c in result.refusals}


def test_a_second_run_finds_the_same_and_says_that_nothing_changed():
    first = run(looked(Mixed()), FindFunctional()).program
    again = run(first, FindFunctional())
    assert not again.modified
    assert (again.program.sites, again.program.refused) == (first.sites, first.refused)


def test_without_a_recording_nothing_is_read():
    program = Program.of(Mixed())
    result = run(program, FindFunctional())
    assert not result.modified
    assert result.program.sites == program.sites
