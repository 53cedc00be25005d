"""Rows that a layer reads: products, corrections and errors against float64."""

import pytest
import torch

from oftfx.folding.shown import Showing, Shown
from tests.reference import rel


def rows(count, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(count, width, generator=generator) @ mix


def test_products_are_those_of_all_rows_in_any_shape_and_dtype():
    x = rows(30, 7)
    y = x + 0.1 * rows(30, 7, 1)
    shown = Shown([x[:10].view(2, 5, 7), x[10:]], [y[:10].view(2, 5, 7), y[10:]])
    a, b = x.double(), y.double()
    assert shown.tokens == 30
    assert shown.width == 7
    assert rel(shown.seen, a.T @ a) < 1e-6
    assert rel(shown.missed, a.T @ (b - a)) < 1e-5
    half = Shown([x.half()], [None])
    assert rel(half.seen, a.half().double().T @ a.half().double()) < 1e-6


def test_nothing_is_missed_where_both_models_are_the_same_so_far():
    x = rows(12, 5)
    assert Shown([x], [x.clone()]).missed is None
    assert Shown([x], [None]).missed is None
    target = torch.randn(3, 5)
    assert Shown([x], [x.clone()]).corrected(target, x.T @ x, 1.0) is target


def test_a_corrected_weight_is_the_ridged_least_squares_solution():
    x = rows(400, 9)
    y = x + 0.3 * x @ rows(9, 9, 3)  # what was missed depends on what is read
    target, shown = torch.randn(4, 9), Shown([x], [y])
    got = shown.corrected(target, shown.seen, 1.0)
    a, b, t = x.double(), y.double(), target.double()
    moments = a.T @ a
    ridge = moments + 0.05 * moments.diagonal().mean() * torch.eye(9).double()
    assert rel(got, t + t @ (torch.linalg.solve(ridge, a.T @ (b - a))).T) < 1e-5
    before, after = (torch.linalg.norm(a @ w.double().T - b @ t.T) for w in (target, got))
    assert after < 0.7 * before
    half = shown.corrected(target, shown.seen, 0.5)
    assert rel(half, (got + target) / 2) < 1e-6


def test_shrinking_takes_away_what_is_noise_and_leaves_what_is_seen():
    width = 40
    few, many = rows(60, width), rows(50_000, width)
    diagonal = torch.diag(Shown([few], [None]).seen.diagonal())
    true = many.double().T @ many.double() * (60 / 50_000)
    shown = Shown([few], [None])
    errors = {kind: rel(shown.moments(kind), true) for kind in ("as seen", "shrunk", "diagonal")}
    assert errors["shrunk"] < min(errors["as seen"], errors["diagonal"])
    assert torch.equal(shown.moments("diagonal"), diagonal)
    assert torch.equal(shown.moments("shrunk").diagonal(), shown.seen.diagonal())
    rich = Shown([many], [None])
    assert rel(rich.moments("shrunk"), rich.seen) < 1e-3
    alone = Shown([torch.randn(50, 8)], [None])  # independent inputs: correlations are noise alone
    off = alone.moments("shrunk") - alone.moments("diagonal")
    assert off.norm() < 0.5 * (alone.seen - alone.moments("diagonal")).norm()


@pytest.mark.parametrize("count", [1, 3, 8, 17])
def test_a_split_shares_the_rows_out(count):
    x = [rows(8, 3, seed) for seed in range(count)]
    y = [a + 1 for a in x]
    learn, judge = Shown(x, y).split()
    assert learn.tokens + judge.tokens == 8 * count
    assert judge.tokens == (8 * (count // 8) if count >= 8 else 2 * count)
    both = [t for part in (learn, judge) for a, b in part.rows() for t in (a, b - 1)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(both[::2], both[1::2], strict=True))
    found = torch.cat(both[::2]).sum(1).sort().values
    assert torch.allclose(found, torch.cat(x).sum(1).sort().values, atol=1e-6)


def test_outputs_are_judged_on_not_too_many_rows():
    x = rows(5000, 6)
    shown, weight = Shown([x], [2 * x]), torch.randn(4, 6)
    assert len(shown.outputs(weight)) <= 1250
    assert rel(shown.outputs(weight, own=True) * 2, shown.outputs(weight)) < 1e-6
    few = Shown([x[:7]], [None])
    assert rel(few.outputs(weight), x[:7].double() @ weight.double().T) < 1e-6


def test_layers_that_read_the_same_share_what_is_known_until_it_is_written_to():
    showing, x, y = Showing(), torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    first = showing.of([x], [y])
    assert showing.of([x], [y]) is first
    assert showing.of([x], [None]) is not first
    first = showing.of([x], [y])
    y.mul_(2)
    second = showing.of([x], [y])
    assert second is not first
    assert rel(second.missed, x.double().flatten(0, 1).T @ (y - x).double().flatten(0, 1)) < 1e-5
    assert showing.of([x], [torch.randn(3, 4)]).missed is None  # not of the same tokens
    with torch.inference_mode():
        z = torch.randn(3, 4)
        assert showing.of([z], [None]) is not showing.of([z], [None])
