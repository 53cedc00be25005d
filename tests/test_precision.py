"""Errors of large tensors in parts, against the whole in float64."""

import math

import pytest
import torch

from oftfx.precision import piece_on, pieces, relative_error
from tests.storage_tracker import StorageTracker


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (1000, 700), (3, 200, 999), (2, 1, 600000), (600000,)])
def test_the_error_is_that_of_the_whole(shape, dtype):
    a = torch.randn(shape, dtype=torch.float64).to(dtype)
    b = (a.double() + 1e-3 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    expected = (a.double() - b.double()).norm() / b.double().norm() if a.numel() else 0.0
    assert relative_error(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_any_memory_layout():
    a, b = torch.randn(700, 1000).T, torch.randn(2000, 700)[::2]
    expected = (a.double() - b.double()).norm() / b.double().norm()
    assert relative_error(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_zeros_and_what_is_not_finite():
    zeros, ones = torch.zeros(4), torch.ones(4)
    assert relative_error(zeros, zeros) == 0.0
    assert relative_error(ones, zeros) == 2.0
    assert math.isnan(relative_error(torch.tensor([1.0, math.nan]), torch.ones(2)))
    assert relative_error(torch.tensor([1.0, math.inf]), torch.ones(2)) == math.inf


def test_pieces_cover_every_element_once_in_order():
    x = torch.arange(3 * 4 * 200000).view(3, 4, 200000)
    parts = [p for (p,) in pieces(x)]
    assert len(parts) > 1
    assert torch.equal(torch.cat(parts).view_as(x), x)
    assert max(p.numel() for p in parts) <= piece_on(x.device)


def test_logits_are_not_copied_as_a_whole():
    """A vocabulary of 32000: the float64 copies were 6 times the logits in bfloat16 and more."""
    logits = torch.randn(2, 64, 32000).bfloat16()
    other, tracker = logits + 0.125, StorageTracker()
    with tracker.watching():
        assert relative_error(other, logits) == pytest.approx(0.125, rel=0.05)
    assert tracker.peak <= logits.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_compared_stays_as_it_is(dtype):
    got, expected = torch.randn(7, 5, dtype=dtype), torch.randn(7, 5, dtype=dtype)
    before = got.clone(), expected.clone()
    first = relative_error(got, expected)
    assert torch.equal(got, before[0])
    assert torch.equal(expected, before[1])
    assert relative_error(got, expected) == first
