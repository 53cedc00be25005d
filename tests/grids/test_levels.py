"""Rounding to the nearest level, against every distance computed in float64."""

import pytest
import torch

from oftfx.grids.levels import Float4, Table, _counted

NF4 = torch.tensor(
    [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
     0.7230, 1.0]
)  # fmt: skip
MANY = 60_000  # more than what is searched one by one


def awkward(limits, count=MANY, seed=0):
    """Random values, the limits, their neighbours in float32, infinities."""
    spread = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * limits.abs().max()
    near = [torch.nextafter(limits, limits.new_full(limits.shape, to)) for to in (-torch.inf, torch.inf)]
    ends = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, torch.nan, 3e38, -3e38])
    return torch.cat([spread, limits, *near, ends])


@pytest.mark.parametrize("kind", ["nf4", "random", "one", "two", "near", "many", "far"])
def test_counting_limits_is_a_search(kind):
    limits = {
        "nf4": (NF4[1:] + NF4[:-1]) / 2,
        "random": torch.randn(15, generator=torch.Generator().manual_seed(3)).sort().values,
        "one": torch.tensor([0.3]),
        "two": torch.tensor([-1e-3, 7e5]),
        "near": torch.tensor([0.0, 1e-7, 1.0]),  # in one cell: falls back on the search
        "many": torch.linspace(-1, 1, 255),
        "far": torch.tensor([1e4, 1e4 + 1, 1e4 + 2]),
    }[kind]
    values = awkward(limits)
    assert values.numel() >= 16 * 2**11
    expected = torch.bucketize(values, limits, out_int32=True)
    assert torch.equal(_counted(values, limits), expected)
    assert torch.equal(_counted(values[:200], limits), expected[:200])
    square = values[: 200 * 250].view(200, 250).T  # not contiguous
    assert torch.equal(_counted(square, limits), torch.bucketize(square.contiguous(), limits, out_int32=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_of_another_dtype_and_another_default_device(dtype):
    limits = (NF4[1:] + NF4[:-1]) / 2
    above = limits.double() * (1 + 1e-12) if dtype == torch.float64 else limits  # a float64 between two float32
    values = torch.cat([torch.linspace(-1.2, 1.2, MANY, dtype=torch.float64), above.double()]).to(dtype)
    expected = (values.double().unsqueeze(1) > limits.double()).sum(1)
    with torch.device("meta"):
        assert torch.equal(_counted(values, limits).long(), expected)
        narrow = values.float()
        assert torch.equal(_counted(narrow, limits).long(), (narrow.unsqueeze(1) > limits).sum(1))


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_table_gives_the_nearest_entry(shuffled):
    entries = NF4[torch.randperm(16, generator=torch.Generator().manual_seed(1))] if shuffled else NF4
    table = Table(entries)
    values = torch.randn(300, 200, generator=torch.Generator().manual_seed(2))
    codes = table.encode(values)
    assert codes.dtype == torch.uint8
    distances = (values.double().unsqueeze(-1) - entries.double()).abs()
    taken = distances.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)
    assert float((taken - distances.amin(-1)).max()) < 1e-7
    assert torch.equal(table.decode(codes), entries[codes.long()])


def test_four_bit_floats_round_halves_to_even():
    levels = Float4()
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    halves = (magnitudes[1:] + magnitudes[:-1]) / 2
    few, many = levels.encode(halves), levels.encode(halves.repeat(6000))
    assert few.tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert torch.equal(many, few.repeat(6000))
