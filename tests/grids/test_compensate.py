"""Error-compensated rounding: held-out outputs, limiting cases, and a plain float64 implementation."""

from dataclasses import replace

import pytest
import torch

from oftfx.grids import Float8, Grid, Integers, Partition, Table, compensated
from oftfx.grids.compensate import inverse_factor
from oftfx.grids.grid import _NARROWEST, _STEPS
from tests.reference import rel

NF4 = torch.tensor([-1.0, -0.7, -0.52, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0])
ROWS, COLUMNS = SHAPE = (24, 96)


def half(scale):
    return scale.half().float()


def coupled(scale):
    step = scale.max() / 50
    return (scale / step).round().clamp(min=1) * step, None


def grids(shape):
    rows, columns = shape
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    return {
        "groups, table": Grid(Partition.tiles(shape, (1, 32)), Table(NF4)),
        "groups, integer zero": Grid(Partition.tiles(shape, (1, 32)), Integers(0, 15), "integer", round_scale=half),
        "short last group": Grid(Partition.tiles(shape, (1, 36)), Integers(0, 15), "integer", round_scale=half),
        "act-order": Grid(Partition.tiles(shape, (1, 32), order), Integers(0, 15), "integer"),
        "act-order, one group a column": Grid(Partition.tiles(shape, (rows, 1), order), Integers(-8, 7, 8.0)),
        "fixed zero": Grid(Partition.tiles(shape, (1, 32)), Integers(0, 15, 8.0), 8.0),
        "rows": Grid(Partition.tiles(shape, (1, columns)), Integers(-8, 7, 8.0)),
        "tensor": Grid(Partition.tiles(shape, shape), Integers(-8, 7, 8.0)),
        "rectangles, float8": Grid(Partition.tiles(shape, (16, 32)), Float8(torch.float8_e4m3fn)),
        "runs across rows": Grid(Partition.flat(shape, 40), Table(NF4)),
        "coupled": Grid(Partition.tiles(shape, (1, 32)), Table(NF4), couple=coupled),
        "strided, float zero": Grid(Partition.strided(shape, 12), Integers(0, 15), "float", round_scale=half),
        "strided across columns": Grid(Partition.strided(shape, 36), Integers(0, 15), "float"),
    }


@pytest.fixture(params=grids(SHAPE))
def grid(request):
    return grids(SHAPE)[request.param]


def inputs(count, columns=COLUMNS):
    """Channels that depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(7)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    mix = mix @ torch.diag(torch.logspace(0, -1.5, columns)[torch.randperm(columns, generator=generator)])
    mix += 0.1 * torch.eye(columns)
    return [torch.randn(count, columns, generator=generator) @ mix for _ in range(2)]


def test_it_beats_the_nearest_codes_on_inputs_it_has_not_seen(grid):
    weight = torch.randn(SHAPE) * 0.05
    seen, fresh = inputs(4 * COLUMNS)
    expected = fresh @ weight.T

    def error(coded):
        return rel(fresh @ grid.values(coded).T, expected)

    # Measured 0.51 to 0.68 of the better of the two.
    nearest = min(error(grid.fit(weight)), error(grid.fit(weight, search=True)))
    assert error(compensated(grid, weight, seen.T @ seen)) < 0.75 * nearest


@pytest.mark.parametrize("update", [0.01, 0.05, 0.3])
def test_a_small_update_stays_on_the_grid_that_it_came_from(grid, update):
    """Whose scales a quantizer has chosen in its own way: here wider than any that the search tries."""
    old = grid.fit(torch.randn(SHAPE) * 0.05)
    scale = grid.stored(old.scale * 1.08)[0]
    old = replace(old, scale=scale, parts=None)
    base = grid.values(old)
    weight = base + update * base.norm() * torch.nn.functional.normalize(torch.randn(SHAPE).flatten(), dim=0).view(
        SHAPE
    )
    seen, fresh = inputs(6 * COLUMNS)
    expected, moments = fresh @ weight.T, seen.T @ seen

    def error(coded):
        return rel(fresh @ grid.values(coded).T, expected)

    found = error(compensated(grid, weight, moments, old=old))
    assert found < 1.05 * error(compensated(grid, weight, moments))
    if update < 0.1:
        assert found < 1.01 * rel(fresh @ base.T, expected)


def test_with_independent_inputs_it_is_rounding_to_nearest(grid):
    weight, diagonal = torch.randn(SHAPE) * 0.05, torch.rand(COLUMNS) + 0.5
    coded = compensated(grid, weight, torch.diag(diagonal))
    assert torch.equal(coded.codes, grid.encode(weight, coded.scale, coded.zero).codes)
    searched = grid.fit(weight, search=True, importance=diagonal + 0.01 * diagonal.mean())
    # Two shares may be equally good but for the last bit.
    assert (coded.scale != searched.scale).float().mean() < 0.02
    error = [float(((grid.values(c) - weight).square() * diagonal).sum()) for c in (coded, searched)]
    assert error[0] == pytest.approx(error[1], rel=1e-4)


def test_a_multiple_of_the_moments_is_the_same(grid):
    weight = torch.randn(SHAPE) * 0.05
    seen = inputs(300)[0]
    moments = seen.T @ seen
    one, other = (compensated(grid, weight, m) for m in (moments, moments * 2.0**-12))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, other.scale)


def test_what_comes_out_is_on_the_grid(grid):
    weight = torch.randn(SHAPE) * 0.05
    before, seen = weight.clone(), inputs(300)[0]
    moments = seen.T @ seen
    kept = moments.clone()
    coded = compensated(grid, weight, moments)
    assert torch.equal(weight, before)
    assert torch.equal(moments, kept)
    assert coded.codes.shape == SHAPE
    assert coded.scale.shape == (grid.partition.groups,)
    assert torch.equal(grid.round_scale(coded.scale), coded.scale)
    if grid.zero == "integer":
        assert torch.equal(coded.zero, coded.zero.round().clamp(0, 15))
    again = grid.nearest(grid.values(coded), coded)
    assert torch.equal(again.codes, coded.codes)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_fewer_inputs_than_channels(grid, rows):
    weight = torch.randn(SHAPE) * 0.05
    seen = inputs(rows)[0]
    coded = compensated(grid, weight, seen.T @ seen)
    values = grid.values(coded)
    assert values.isfinite().all()
    nearest = rel(seen @ grid.values(grid.fit(weight, search=True)).T, seen @ weight.T)
    assert rel(seen @ values.T, seen @ weight.T) < 0.7 * nearest
    assert rel(values, weight) < 0.6


def test_moments_of_nothing_are_plain_rounding(grid):
    weight = torch.randn(SHAPE) * 0.05
    coded, plain = compensated(grid, weight, torch.zeros(COLUMNS, COLUMNS)), grid.fit(weight, search=True)
    assert torch.equal(coded.codes, plain.codes)
    assert torch.equal(coded.scale, plain.scale)


def test_dead_channels_are_rounded_to_nearest_and_move_nothing(grid):
    weight = torch.randn(SHAPE) * 0.05
    seen = inputs(400)[0]
    dead = torch.arange(3, COLUMNS, 7)
    seen[:, dead] = 0
    moments = seen.T @ seen
    coded = compensated(grid, weight, moments)
    nearest = grid.encode(weight, coded.scale, coded.zero).codes
    assert torch.equal(coded.codes[:, dead], nearest[:, dead])
    assert not torch.equal(coded.codes, nearest)


def test_moments_that_float32_cannot_invert():
    """Equal channels, and sizes ten orders apart."""
    x = torch.randn(50, 8)
    x = torch.cat([x, x, x * 1e5, x * 1e-5], 1)
    moments = x.T @ x
    upper = inverse_factor(moments, 0.01, torch.arange(len(moments)))
    assert upper.isfinite().all()
    assert torch.equal(upper, upper.triu())
    shape = (6, 32)
    grid = Grid(Partition.tiles(shape, (1, 8)), Integers(-8, 7, 8.0))
    weight = torch.randn(shape)
    coded = compensated(grid, weight, moments)
    assert rel(x @ grid.values(coded).T, x @ weight.T) < rel(x @ grid.values(grid.fit(weight)).T, x @ weight.T)


def test_the_factor_inverts_the_damped_moments():
    x = torch.randn(60, 20, dtype=torch.float64)
    moments = x.T @ x
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    order, kept = torch.randperm(20), moments.clone()
    upper = inverse_factor(moments, 0.01, order)
    assert torch.equal(upper, upper.triu())
    assert rel(upper.T @ upper, torch.linalg.inv(damped[order][:, order])) < 1e-12
    assert torch.equal(moments, kept)


def searched(weight, importance, top):
    """The best of some symmetric ranges for rows of columns, float64; scales by row."""
    best, scale = torch.full((len(weight),), torch.inf, dtype=torch.float64), torch.zeros(len(weight)).double()
    for share in torch.linspace(1, _NARROWEST, _STEPS + 1, dtype=torch.float64):
        s = weight.abs().amax(1) * share / top
        values = (weight / s[:, None]).round().clamp(-top, top - 1) * s[:, None]
        error = ((values - weight) ** 2 * importance).sum(1)
        scale = torch.where(error < best, s, scale)
        best = torch.minimum(best, error)
    return scale


def plain_gptq(weight, moments, group, top, damping):
    """Column by column: round, then eliminate the column from the inverse Hessian. No blocks, no factor; float64."""
    weight, moments = weight.double().clone(), moments.double()
    columns = weight.shape[1]
    size = moments.diagonal()
    damped = moments + damping * size.mean() * torch.eye(columns, dtype=torch.float64)
    sets = sorted((list(range(i, i + group)) for i in range(0, columns, group)), key=lambda s: -float(size[s].mean()))
    sets = [sorted(s, key=lambda c: -float(size[c])) for s in sets]
    order, costs, left = [c for s in sets for c in s], {}, damped
    for place, column in enumerate(order):  # what an error costs when the later columns make up for it
        rest = order[place:]
        costs[column] = float(1 / torch.linalg.inv(damped[rest][:, rest])[0, 0])
    result = torch.zeros_like(weight)
    done = []
    for members in sets:
        importance = torch.tensor([costs[c] for c in members], dtype=torch.float64)
        scale = searched(weight[:, members], importance, top)
        for column in members:
            left = [c for c in order if c not in done]
            inverse = torch.linalg.inv(damped[left][:, left])
            assert left[0] == column
            code = (weight[:, column] / scale).round().clamp(-top, top - 1)
            result[:, column] = code * scale
            error = (weight[:, column] - result[:, column]) / inverse[0, 0]
            weight[:, left[1:]] -= error[:, None] * inverse[0, 1:]
            done.append(column)
    return result


@pytest.mark.parametrize(("columns", "group"), [(24, 8), (20, 20), (90, 90), (80, 16)])
def test_it_is_gptq_column_by_column(columns, group):
    """(90, 90) crosses the block of 64 columns whose corrections are applied together."""
    seen = inputs(3 * columns, columns)[0]
    weight, moments = torch.randn(5, columns) * 0.05, seen.T @ seen
    grid = Grid(Partition.tiles((5, columns), (1, group)), Integers(-4, 3, 4.0))
    expected = plain_gptq(weight, moments, group, 4, 0.01)
    got = grid.values(compensated(grid, weight, moments))
    assert rel(got, expected) < 1e-6
    assert rel(grid.values(grid.fit(weight, search=True)), expected) > 0.05


def test_everything_is_made_on_the_weights_device(grid):
    """Under another default device; ``meta`` takes part in no operation with a CPU's tensors."""
    weight, moments = torch.randn(SHAPE) * 0.05, inputs(200)[0].T @ inputs(200)[0]
    expected = compensated(grid, weight, moments)
    with torch.device("meta"):
        got = compensated(grid, weight, moments)
        nearest = grid.nearest(weight, got)
    assert torch.equal(grid.values(got), grid.values(expected))
    assert torch.equal(grid.values(nearest), grid.values(grid.nearest(weight, expected)))


def test_moments_stay_as_they_are(grid):
    weight, moments = torch.randn(SHAPE) * 0.05, inputs(200)[0].T @ inputs(200)[0]
    kept = moments.clone()
    compensated(grid, weight, moments)
    assert torch.equal(moments, kept)
