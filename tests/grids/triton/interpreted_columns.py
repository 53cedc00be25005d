"""Triton's loop over columns in its interpreter; test_interpreted.py runs this file."""

import pytest
import torch

from oftfx.grids import Float8, Grid, Integers, Partition, compensated
from oftfx.grids import compensate as module
from oftfx.grids.compensate import _in_torch
from oftfx.grids.triton import choose, columns
from tests.grids.triton.blocks import GRIDS, PARTITION, block
from tests.reference import rel


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize(
    ("width", "rows", "groups"),
    [(40, 9, (0, 32)), (17, 16, (0,)), (33, 5, (0, 7, 20)), (1, 1, (0,)), (2, 33, (0, 1))],
)
def test_codes_are_torchs_and_errors_to_rounding(kind, width, rows, groups):
    grid = GRIDS[kind]
    rest, upper, scales, zeros = block(grid, width, rows, groups)
    whole = rest.clone()
    codes, errors = columns.rounded(grid, rest, upper, scales, zeros)
    assert torch.equal(rest, whole)
    expected, missed = _in_torch(grid, rest.clone(), upper, scales, zeros)
    assert codes.dtype == expected.dtype
    assert torch.equal(codes, expected)
    # Torch's product on a CPU is summed in another way; a step's last bit is a few of the sum's.
    assert float((errors - missed).abs().max()) <= 1e-5 * float(missed.abs().max())
    if width == 40:
        assert len(codes.unique()) >= 14


@pytest.mark.parametrize("kind", ["integers", "float zeros", "nf4", "fp4", "shifts"])
def test_the_first_columns_are_exactly_torchs(kind):
    """Nothing has been propagated there: division, rounding, product and difference are the same to the bit."""
    grid = GRIDS[kind]
    rest, upper, scales, zeros = block(grid, 1, 100)
    got, expected = columns.rounded(grid, rest, upper, scales, zeros), _in_torch(grid, rest, upper, scales, zeros)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_ties_signs_and_what_is_out_of_range():
    for kind in ("integers", "one zero", "nf4", "fp4"):
        grid = GRIDS[kind]
        values = torch.tensor(
            [[0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.5, 0.25, 0.75, -1.75, 99.0, -99.0, 1e30, -1e-40]]
        )
        if kind == "nf4":
            values = torch.cat([values, grid.levels.searched()[0].unsqueeze(0)], 1)
        ones = torch.ones_like(values)
        for upper in (torch.ones(1, 1), torch.full((1, 1), 0.3)):
            got, expected = (f(grid, values.clone(), upper, ones, None) for f in (columns.rounded, _in_torch))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), kind


def test_a_row_that_is_not_finite_stays_in_its_row():
    grid = GRIDS["nf4"]
    rest, upper, scales, zeros = block(grid, 20, 33)
    clean, _ = columns.rounded(grid, rest, upper, scales, zeros)
    rest[3, 7] = torch.nan
    codes, errors = columns.rounded(grid, rest, upper, scales, zeros)
    others = torch.arange(33) != 7
    assert torch.equal(codes[:, others], clean[:, others])
    assert not errors[3:, 7].isfinite().any()


def test_strides():
    grid = GRIDS["integer zeros"]
    rest, upper, scales, zeros = block(grid, 20, 33)
    wide = torch.zeros(20, 50)
    wide[:, 4:37] = rest
    expected = columns.rounded(grid, rest, upper, scales, zeros)
    got = columns.rounded(grid, wide[:, 4:37], upper.T.contiguous().T, scales.T.contiguous().T, zeros.T.contiguous().T)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


WHOLE = {
    "groups start within a block": Partition.tiles((12, 96), (1, 24)),
    "one set, groups of another size": Partition.flat((12, 96), 40),
    "rows": Partition.tiles((12, 96), (1, 96)),
    "act-order": Partition.tiles((12, 96), (1, 32), torch.randperm(96, generator=torch.Generator().manual_seed(1))),
    "strided": Partition.strided((12, 96), 36),
    "short last group": Partition.tiles((12, 101), (1, 36)),
}


@pytest.mark.parametrize(
    ("kind", "of"),
    list(zip(WHOLE, ["nf4", "float zeros", "integers", "integer zeros", "float zeros", "nf4"], strict=True)),
)
def test_a_whole_weight(kind, of, monkeypatch):
    partition = WHOLE[kind]
    grid = Grid(partition, GRIDS[of].levels, GRIDS[of].zero)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(12, partition.columns, generator=generator) * 0.05
    inputs = torch.randn(300, partition.columns, generator=generator)
    inputs += 0.5 * inputs.roll(1, 1)
    seen, by_triton = [], columns.rounded
    monkeypatch.setattr(columns, "rounded", lambda g, rest, *a: seen.append(len(rest)) or by_triton(g, rest, *a))
    got = compensated(grid, weight, inputs.T @ inputs)
    assert sum(seen) == partition.columns  # by the kernel, every column
    monkeypatch.setattr(choose, "rounds", lambda *_: False)
    expected = compensated(grid, weight, inputs.T @ inputs)
    # A last bit may decide a code, or a scale that is searched; then the later ones of its row differ as well.
    assert (got.codes != expected.codes).any(1).float().mean() <= 0.05
    exact = inputs.double() @ weight.double().T
    errors = [rel(inputs.double() @ grid.values(c).double().T, exact) for c in (got, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


def test_what_the_kernel_does_not_know_is_torchs():
    rest = torch.zeros(8, 4)
    assert choose.rounds(GRIDS["nf4"], rest, None, _in_torch)
    assert not choose.rounds(GRIDS["nf4"], torch.zeros(4, 8).T, None, _in_torch)
    assert not choose.rounds(GRIDS["nf4"], rest.double(), None, _in_torch)
    assert not choose.rounds(GRIDS["nf4"], torch.zeros(65, 4), None, _in_torch)
    assert not choose.rounds(GRIDS["nf4"], torch.zeros(8, 0), None, _in_torch)
    assert not choose.rounds(Grid(PARTITION, Float8(torch.float8_e4m3fn)), rest, None, _in_torch)
    assert not choose.rounds(Grid(PARTITION, Integers(-8, 7, 7.0), product=torch.float64), rest, None, _in_torch)

    class Other(Grid):
        """May compute its values in another way."""

    assert not choose.rounds(Other(PARTITION, Integers(-8, 7, 7.0)), rest, None, _in_torch)
    assert module._BLOCK <= choose.WIDEST


@pytest.mark.parametrize("kind", GRIDS)
def test_the_kernel_is_held_against_torch_on_such_numbers(kind):
    grid = GRIDS[kind]

    def by(function):
        return lambda weight: function(grid, *choose.problem(grid, weight, not grid.symmetric))

    weight = torch.randn(30, 21)
    choose.check(by(_in_torch), by(columns.rounded), [weight])
    codes, _ = by(_in_torch)(weight)
    assert len(codes.unique()) > 12
