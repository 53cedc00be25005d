"""Rounding to the nearest level, against every distance computed in float64."""

import pytest
import torch

from oftfx.grids.levels import Float4, Table

NF4 = torch.tensor(
    [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
     0.7230, 1.0]
)  # fmt: skip


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
