"""Rounding to a grid against a search over every level, in float64."""

import pytest
import torch

from oftfx.grids import Codes, Float8, Grid, Integers, Partition, Table
from oftfx.grids.grid import _NARROWEST, _STEPS
from tests.reference import rel

SHAPE = (6, 20)
NF4 = torch.tensor([-1.0, -0.7, -0.52, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0])


def half(scale):
    return scale.half().float()


def mean_coupled(scale):
    """A second quantization: scales in steps of a twentieth of the largest."""
    step = scale.max() / 20
    steps = (scale / step).round()
    return steps * step, (steps, step)


GRIDS = {
    "table": Grid(Partition.tiles(SHAPE, (1, 8)), Table(NF4)),
    "float8": Grid(Partition.tiles(SHAPE, (4, 8)), Float8(torch.float8_e4m3fn)),
    "symmetric": Grid(Partition.tiles(SHAPE, (1, 20)), Integers(-8, 7, 8.0), round_scale=half),
    "one scale": Grid(Partition.tiles(SHAPE, SHAPE), Integers(-127, 127, 127.0)),
    "integer zero": Grid(Partition.tiles(SHAPE, (1, 8)), Integers(0, 15), "integer", round_scale=half),
    "integer zero from 1": Grid(Partition.tiles(SHAPE, (1, 8)), Integers(0, 15), "integer", least_zero=1),
    "fixed zero": Grid(Partition.tiles(SHAPE, (1, 8)), Integers(0, 15, 8.0), 8.0, round_scale=half),
    "float zero": Grid(Partition.flat(SHAPE, 12), Integers(0, 7), "float", round_scale=half),
    "strided": Grid(Partition.strided(SHAPE, 6), Integers(0, 3), "float"),
    "act-order": Grid(Partition.tiles(SHAPE, (1, 8), torch.randperm(20)), Integers(0, 15), "integer"),
    "coupled": Grid(Partition.flat(SHAPE, 8), Table(NF4), couple=mean_coupled),
}


@pytest.fixture(params=GRIDS)
def grid(request):
    return GRIDS[request.param]


def every_level(grid):
    if isinstance(grid.levels, Integers):
        return torch.arange(grid.levels.low, grid.levels.high + 1).double()
    if isinstance(grid.levels, Table):
        return grid.levels.values.double()
    values = torch.arange(256, dtype=torch.uint8).view(grid.levels.dtype).double()
    return values[values.isfinite()]


def brute(grid, weight, scale, zero):
    """The best value for every element, and its distance, by trying all levels; float64."""
    offset = zero if zero is not None else torch.full_like(scale, float(grid.zero))
    levels = every_level(grid)
    scale, offset = (grid.partition.expand(v).double().unsqueeze(-1) for v in (scale, offset))
    values = (levels - offset) * scale
    missed = (values - weight.double().unsqueeze(-1)).abs()
    best = missed.min(-1)
    return values.gather(-1, best.indices.unsqueeze(-1)).squeeze(-1), best.values


@pytest.mark.parametrize("search", [False, True])
def test_codes_are_the_nearest_of_all_levels(grid, search):
    weight = torch.randn(SHAPE) * 0.05 + 0.02
    coded = grid.fit(weight, search=search)
    _, least = brute(grid, weight, coded.scale, coded.zero)
    missed = (grid.values(coded).double() - weight.double()).abs()
    assert (missed - least).max() < 1e-6 * weight.abs().max()
    assert (coded.zero is None) == grid.symmetric
    assert torch.equal(grid.encode(weight, coded.scale, coded.zero).codes, coded.codes)


def test_scales_and_zeros_are_what_the_format_can_store(grid):
    coded = grid.fit(torch.randn(SHAPE) * 0.05 + 0.02, search=True)
    assert torch.equal(grid.round_scale(coded.scale), coded.scale)
    assert grid.zero != "float" or torch.equal(grid.round_scale(coded.zero), coded.zero)
    if grid.zero == "integer":
        assert torch.equal(coded.zero, coded.zero.round())
        assert coded.zero.min() >= (grid.least_zero or grid.levels.low)
        assert coded.zero.max() <= grid.levels.high
    if grid.couple is not None:
        steps, step = coded.parts
        assert torch.equal(coded.scale, steps * step)
        assert torch.equal(steps, steps.round())


@pytest.mark.parametrize("zero", [0.0, 0.03, -0.5, 0.5])
def test_the_range_of_a_group_reaches_its_elements(grid, zero):
    """Without a search nothing is cut off: each element is within half the widest step, or a scale's rounding."""
    weight = torch.rand(SHAPE) * 0.1 - 0.05 + zero
    coded = grid.fit(weight)
    levels = every_level(grid).sort().values
    widest = float((levels[1:] - levels[:-1]).max())
    if isinstance(grid.levels, Float8):
        widest = 32.0  # between the two largest of e4m3
    if grid.zero == 8.0 or (
        grid.symmetric and isinstance(grid.levels, Integers) and grid.levels.high < grid.levels.reach
    ):
        widest *= 2  # one positive level less than there are negative ones
    if grid.zero == "integer":
        widest *= 2  # the zero is rounded
    if grid.couple is not None:
        assert (grid.values(coded) - weight).abs().max() < 0.2 * weight.abs().max()
        return
    steps = grid.partition.expand(coded.scale) * widest
    assert ((grid.values(coded) - weight).abs() <= 0.51 * steps + 1e-3 * weight.abs().max()).all()


def test_the_search_is_the_best_of_all_its_shares(grid):
    """Group by group: no narrower range on the list has a smaller weighted error."""
    weight = torch.randn(SHAPE) * 0.05
    importance = torch.rand(SHAPE) * torch.logspace(0, 2, SHAPE[1])
    if grid.couple is not None:
        coded = grid.fit(weight, search=True)
        plain = grid.fit(weight)
        assert (grid.values(coded) - weight).norm() <= 1.01 * (grid.values(plain) - weight).norm()
        return
    coded = grid.fit(weight, search=True, importance=importance)
    split = grid.partition.split

    def errors(scale, zero):
        _, missed = brute(grid, weight, scale, zero)
        return split(missed.square() * importance).sum(1)

    found = errors(coded.scale, coded.zero)
    best = torch.full_like(found, torch.inf)
    for step in range(_STEPS + 1):
        share = 1 - (1 - _NARROWEST) * step / _STEPS
        groups = split(weight)
        if grid.symmetric:
            scale, zero = grid.round_scale(groups.abs().amax(1) * share / grid.levels.reach), None
        else:
            low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
            top = grid.levels.high
            if grid.least_zero:
                low = torch.minimum(low, -high * grid.least_zero / (top - grid.least_zero))
            scale = grid.round_scale((high - low) * share / top)
            zero = -low * share / scale
            zero = zero.round().clamp(grid.least_zero or 0, top) if grid.zero == "integer" else grid.round_scale(zero)
        best = torch.minimum(best, errors(scale, zero))
    assert (found <= best * (1 + 1e-3)).all()
    whole = grid.fit(weight)
    gain = float(found.sum() / errors(whole.scale, whole.zero).sum())
    assert gain < 1 if grid.partition.groups > 1 else gain <= 1


def test_scales_that_are_known_are_tried_as_well(grid):
    """Group by group, or all together; those of another rule, to which no share of a range leads, are found again."""
    weight, importance = torch.randn(SHAPE) * 0.05, torch.rand(SHAPE)
    known = grid.fit(weight * 0.93)
    own = grid.values(known)
    found = grid.fit(own, search=True, importance=importance, old=known)
    assert torch.equal(found.scale, known.scale)
    assert found.zero is known.zero or torch.equal(found.zero, known.zero)
    assert found.parts is known.parts
    assert torch.equal(grid.values(found), own)

    def errors(coded):
        missed = (grid.values(coded) - weight).square() * importance
        return grid.partition.split(missed).sum(1) if grid.couple is None else missed.sum()

    without = grid.fit(weight, search=True, importance=importance)
    for share in (0.7, 0.8, 0.9, 0.97):
        known = grid.fit(weight * share)
        found = grid.fit(weight, search=True, importance=importance, old=known)
        kept = grid.encode(weight, known.scale, known.zero)
        least = torch.minimum(errors(without), errors(kept))
        torch.testing.assert_close(errors(found), least, rtol=1e-5, atol=0)


def test_unchanged_groups_keep_their_bytes_and_others_take_the_better_scales(grid):
    old = grid.fit(torch.randn(SHAPE) * 0.05, search=True)
    was = grid.values(old)
    again = grid.nearest(was, old)
    assert torch.equal(again.codes, old.codes)
    assert torch.equal(again.scale, old.scale)
    assert old.zero is None or torch.equal(again.zero, old.zero)
    weight = was.clone()
    weight[2, 3] += 0.31  # one element of one group
    mine = grid.partition.expand(torch.arange(grid.partition.groups).float())
    touched = int(mine[2, 3])
    coded = grid.nearest(weight, old)
    if grid.couple is None:
        others = torch.arange(grid.partition.groups) != touched
        assert torch.equal(coded.scale[others], old.scale[others])
        assert torch.equal(coded.codes[mine != touched], old.codes[mine != touched])
        fresh = grid.fit(weight)
        errors = [
            float((grid.values(c) - weight)[mine == touched].square().sum())
            for c in (coded, fresh, grid.encode(weight, old.scale, old.zero))
        ]
        assert errors[0] <= min(errors[1:]) * (1 + 1e-5)
    assert abs(float(grid.values(coded)[2, 3] - weight[2, 3])) < 0.1


@pytest.mark.parametrize("levels", [Integers(-8, 7, 7.5), Integers(-128, 127, 128.0), Integers(0, 15, 7.5)])
def test_scales_follow_the_largest_weight(levels):
    """What a scale by ``reach`` has cut off, or rounded, is not stored as large as it was."""
    zero = (levels.low + levels.high + 1) / 2
    grid = Grid(Partition.tiles((24, 96), (1, 32)), levels, zero, product=torch.float16, round_scale=half)
    old = grid.fit(torch.randn(24, 96) * 0.05)
    was = grid.values(old)
    assert ((grid.fit(was).scale / old.scale - 1).abs() > 0.002).float().mean() > 0.5
    weight = was * (1 + 1e-4)  # no group is what it was
    coded = grid.nearest(weight, old)
    assert ((coded.scale / old.scale - 1).abs() < 1e-3).all()
    assert torch.equal(coded.codes, old.codes)
    assert rel(grid.values(coded), weight) < 1e-3


def test_a_table_that_holds_a_value_twice_keeps_the_old_byte():
    grid = Grid(Partition.tiles((1, 4), (1, 4)), Table(torch.tensor([-1.0, 0.0, 0.0, 1.0])))
    old = Codes(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), torch.tensor([0.5]))
    kept = grid.nearest(grid.values(old), old)
    assert torch.equal(kept.codes, old.codes)


def test_groups_of_zeros_stay_zeros(grid):
    weight = torch.zeros(SHAPE)
    coded = grid.fit(weight, search=True)
    assert torch.equal(grid.values(coded), weight)
    assert coded.scale.isfinite().all()
    assert (coded.scale > 0).all() or grid.couple is not None


def test_values_are_multiplied_and_kept_in_the_runtimes_dtypes():
    weight = torch.randn(4, 8)
    for product, rounded in ((torch.float16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2):
        grid = Grid(Partition.tiles((4, 8), (1, 8)), Integers(-8, 7, 8.0), product=product, rounded=rounded)
        coded = grid.fit(weight)
        expected = coded.codes.to(product) * coded.scale.to(product)[:, None]
        assert torch.equal(grid.values(coded), expected.to(rounded).float())


def test_float8_saturates_and_tables_may_be_unsorted():
    levels = Float8(torch.float8_e4m3fn)
    values = torch.tensor([1e9, -1e9, 0.0, 1.06])
    assert levels.decode(levels.encode(values)).tolist() == [448.0, -448.0, 0.0, 1.0]
    shuffled = NF4[torch.randperm(16)]
    table, x = Table(shuffled), torch.randn(500)
    nearest = (x[:, None] - shuffled).abs().argmin(1)
    assert torch.equal(table.encode(x).long(), nearest)


def test_a_weight_in_bands_is_rounded_as_the_whole(grid, monkeypatch):
    weight, importance = torch.randn(SHAPE) * 0.1, torch.rand(SHAPE)
    near = weight.clone()
    near[2:4] *= 1.5

    def results():
        old = grid.fit(weight, search=True, importance=importance)
        return old, grid.values(old), grid.nearest(grid.values(old), old), grid.nearest(near, old), grid.fit(weight)

    whole = results()
    monkeypatch.setattr("oftfx.grids.grid.piece_on", lambda _: 1)
    assert len(list(grid._bands(weight.device))) == len(grid.partition.bands(1))
    for got, wanted in zip(results(), whole, strict=True):
        if isinstance(wanted, torch.Tensor):
            assert torch.equal(got, wanted)
            continue
        assert torch.equal(got.codes, wanted.codes)
        assert got.codes.dtype == wanted.codes.dtype
        assert torch.equal(got.scale, wanted.scale)
        assert (got.zero is None) == (wanted.zero is None)
        assert got.zero is None or torch.equal(got.zero, wanted.zero)


def test_most_grids_have_several_bands():
    several = {name for name, grid in GRIDS.items() if len(grid.partition.bands(1)) > 1}
    assert set(GRIDS) - several == {"one scale", "strided"}


@pytest.mark.parametrize("kind", ["table", "coupled"])
def test_a_group_that_keeps_its_first_element_has_changed_all_the_same(kind):
    grid = GRIDS[kind]
    old = grid.fit(torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)))
    weight = grid.values(old)
    groups = grid.partition.split(weight).clone()
    groups[0, 1:] += 0.01
    groups[1, 0] = torch.nan  # equals nothing, itself included
    weight = grid.partition.join(groups)
    found, anew = grid.nearest(weight, old), grid.fit(weight)
    changed = torch.zeros(grid.partition.groups, dtype=torch.bool)
    changed[:2] = True
    if kind == "coupled":
        changed[:] = True
    assert torch.equal(found.scale.nan_to_num(-1), torch.where(changed, anew.scale, old.scale).nan_to_num(-1))
    assert torch.equal(found.codes, torch.where(grid.partition.expand(changed), anew.codes, old.codes))


def test_many_groups_of_a_few():
    """The first elements of more groups than a look-up treats one by one."""
    grid = Grid(Partition.flat((512, 512), 16), Table(NF4))
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    old = grid.fit(weight)
    again = grid.values(old)
    changed = again.clone()
    changed[3, 5] += 0.1 * changed.std()
    new = grid.nearest(changed, old)
    same = torch.ones(512 * 512 // 16, dtype=torch.bool)
    same[3 * 32] = False
    assert torch.equal((new.scale == old.scale) | ~same, torch.ones_like(same))
    assert torch.equal(grid.nearest(again, old).codes, old.codes)
