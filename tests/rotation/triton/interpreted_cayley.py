"""Triton's series of the Cayley transform in its interpreter; test_interpreted.py runs this file."""

import pytest
import torch

from oftfx.rotation import cayley, skew_size
from oftfx.rotation.cayley import _in_torch
from oftfx.rotation.triton import cayley as operators
from tests.reference import rel
from tests.rotation.triton.dense import dense_series


@pytest.mark.parametrize(("double", "single"), [(1, False), (2, True), (3, True), (4, False)])
@pytest.mark.parametrize("size", [2, 3, 7, 16, 27, 48])
def test_forward_and_backward_equal_explicit_powers_and_torchs_operators(size, double, single):
    skew = (torch.randn(3, skew_size(size)) * 0.3 / size**0.5).requires_grad_()
    of_blocks = torch.randn(3, size, size)
    found = []
    for function, leaf in (
        (lambda s: operators.cayley_series(s, size, double, single), skew),
        (lambda s: _in_torch(size, (double, single), None, s), skew),
        (lambda s: _in_torch(size, (double, single), None, s), skew.detach().double().requires_grad_()),
    ):
        blocks = function(leaf)
        found.append((blocks, *torch.autograd.grad(blocks, leaf, of_blocks.to(leaf.dtype))))
    (blocks, of_skew), eager, wide = found
    assert rel(blocks, dense_series(skew, size, double, single)) < 3e-7
    assert rel(blocks, eager[0]) < 3e-7
    assert rel(of_skew, wide[1]) < 5e-7
    assert rel(of_skew, eager[1]) < 5e-7


def test_no_skew_is_exactly_the_identity_and_no_rows_are_none():
    assert torch.equal(operators.cayley_series(torch.zeros(3, 21), 7, 3, True), torch.eye(7).expand(3, 7, 7))
    assert operators.cayley_series(torch.zeros(0, 21), 7, 3, True).shape == (0, 7, 7)
    assert operators.cayley_series_backward(torch.zeros(0, 21), torch.zeros(0, 7, 7), 7, 3, True).shape == (0, 21)


def test_what_is_not_finite_stays_in_its_block():
    skew = torch.randn(3, 6) * 0.1
    skew[1, 2] = torch.nan
    blocks = operators.cayley_series(skew, 4, 3, True)
    assert not blocks[1].isfinite().all()
    assert blocks[[0, 2]].isfinite().all()


def test_strides():
    skew, grad = torch.randn(10, 3).T * 0.1, torch.randn(5, 5, 3).permute(2, 1, 0)
    straight = skew.contiguous(), grad.contiguous()
    assert torch.equal(
        operators.cayley_series_backward(skew, grad, 5, 3, True),
        operators.cayley_series_backward(*straight, 5, 3, True),
    )
    assert torch.equal(operators.cayley_series(skew, 5, 3, True), operators.cayley_series(straight[0], 5, 3, True))


def test_gradients_of_gradients():
    first = (torch.randn(2, 10) * 0.2).requires_grad_()
    second = first.detach().double().requires_grad_()
    found = []
    for function, leaf in (
        (lambda s: operators.cayley_series(s, 5, 3, True), first),
        (lambda s: _in_torch(5, (3, True), None, s), second),
    ):
        (of_leaf,) = torch.autograd.grad((function(leaf) ** 3).sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(of_leaf.sin().sum(), leaf)[0])
    assert rel(*found) < 1e-5


@pytest.mark.parametrize("name", ["cayley_series", "cayley_series_backward"])
def test_operators_keep_torchs_rules(name):
    skew = torch.randn(2, 10) * 0.1
    given = (skew.requires_grad_(),) if name == "cayley_series" else (skew, torch.randn(2, 5, 5))
    torch.library.opcheck(getattr(operators, name), (*given, 5, 3, True))


def test_cayley_takes_the_operator_where_it_can(monkeypatch):
    seen = []
    monkeypatch.setattr(operators, "cayley_series", lambda skew, *rest: seen.append(rest) or skew)
    skew = torch.randn(2, 10)
    cayley(skew, 5)
    cayley(skew.bfloat16(), 5, terms=2)
    cayley(skew, 5, "cayley_neumann_016", 4)
    assert seen == [(5, 3, True), (5, 1, False), (5, 3, False)]
    cayley(skew, 5, "cayley")
    cayley(skew, 5, coft_eps=0.1)
    cayley(skew, 5, terms=1)
    cayley(skew.double(), 5)
    cayley(torch.randn(1, skew_size(33)), 33)
    assert len(seen) == 3
    with pytest.raises(ValueError, match="skew entries"):
        cayley(skew, 6)


def test_autocast_does_not_lower_the_precision():
    skew = torch.randn(2, 10) * 0.1
    plain = cayley(skew, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cayley(skew, 5), plain)
