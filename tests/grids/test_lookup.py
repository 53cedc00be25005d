"""Searches among limits and look-ups two at a time, against torch's own search and every comparison in float64."""

import pytest
import torch

from oftfx.grids.levels import Float4, Table
from oftfx.grids.lookup import _FEW, decoded, named

NF4 = torch.tensor(
    [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
     0.7230, 1.0]
)  # fmt: skip
MIDDLES = (NF4[1:] + NF4[:-1]) / 2
MANY = 60_000  # more than what is searched one by one
QUIET, LOUD = 0x7FC00000, 0x7F800001
"""Two NaNs: what arithmetic makes, and one whose first bits are those of infinity."""

LIMITS = {
    "nf4": MIDDLES,
    "random": torch.randn(15, generator=torch.Generator().manual_seed(3)).sort().values,
    "none": torch.empty(0),
    "one": torch.tensor([0.3]),
    "two": torch.tensor([-1e-3, 7e5]),
    "near": torch.tensor([0.0, 1e-7, 1.0]),
    "in one cell": torch.tensor([1.0, 1.0 + 2**-23, 1.0 + 2**-22]),
    "equal": torch.tensor([-0.5, 0.25, 0.25, 0.25, 0.5]),
    "subnormal": torch.tensor([-1e-40, -1e-45, 1e-45, 1e-40]),
    "two zeros": torch.tensor([-0.0, 0.0]),
    "infinite": torch.tensor([-torch.inf, 0.0, torch.inf]),
    "many": torch.linspace(-1, 1, 255),
    "a byte": torch.linspace(-1, 1, 127),
    "more than a byte": torch.linspace(-1, 1, 128),
    "far": torch.tensor([1e4, 1e4 + 1, 1e4 + 2]),
}


def awkward(limits, count=MANY, seed=0):
    """Random values, the limits, their neighbours in float32, infinities, NaNs, subnormals."""
    largest = limits.abs().max() if limits.numel() and limits.isfinite().all() else 1.0
    spread = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * largest
    near = [torch.nextafter(limits, limits.new_full(limits.shape, to)) for to in (-torch.inf, torch.inf)]
    ends = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, torch.nan, 3e38, -3e38, 1e-40, -1e-40, 1e-45, -1e-45])
    bits = torch.tensor([QUIET, LOUD, QUIET - 2**31, LOUD - 2**31], dtype=torch.int32)
    return torch.cat([spread, limits, *near, ends, bits.view(torch.float32)])


def below(values, limits):
    """How many limits are below each value, by every comparison in float64; NaN is above all."""
    return (~(values.double().unsqueeze(-1) <= limits.double())).sum(-1)


def names_of(limits, seed=7):
    """A name for each count, in no order."""
    return torch.randperm(len(limits) + 1, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize("kind", LIMITS)
def test_names_are_those_of_a_search(kind):
    limits = LIMITS[kind]
    values, names = awkward(limits), names_of(limits)
    expected = names[below(values, limits)]
    found = named(values, limits, names)
    assert found.dtype == torch.uint8
    assert torch.equal(found, expected)
    assert torch.equal(named(values[-200:], limits, names), expected[-200:])
    for end in range(1, 9):  # no whole number of eights
        assert torch.equal(named(values[end:], limits, names), expected[end:])
    square = values[: 200 * 250].view(200, 250).T  # not contiguous
    assert torch.equal(named(square, limits, names), names[torch.bucketize(square.contiguous(), limits)])
    ascending = torch.arange(len(limits) + 1).to(torch.uint8)
    assert torch.equal(named(values, limits, ascending).long(), torch.bucketize(values, limits))


def test_around_every_boundary_each_float_is_right():
    steps = torch.arange(-(2**9), 2**9, dtype=torch.int32)
    values = (MIDDLES.view(torch.int32).unsqueeze(1) + steps).view(torch.float32).reshape(-1)
    assert values.numel() > _FEW
    names = names_of(MIDDLES)
    assert torch.equal(named(values, MIDDLES, names), names[below(values, MIDDLES)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_of_another_dtype_and_another_default_device(dtype):
    names = torch.arange(16).to(torch.uint8)
    above = MIDDLES.double() * (1 + 1e-12) if dtype == torch.float64 else MIDDLES  # a float64 between two float32
    values = torch.cat([torch.linspace(-1.2, 1.2, MANY, dtype=torch.float64), above.double()]).to(dtype)
    # Limits that no other test has: what is kept for them is made under the other device.
    limits = MIDDLES if dtype == torch.float64 else MIDDLES * 0.5
    with torch.device("meta"):
        assert torch.equal(named(values, limits, names).long(), below(values, limits))
        narrow = values.float()
        assert torch.equal(named(narrow, limits, names).long(), below(narrow, limits))


def test_what_is_kept_serves_outside_of_inference_mode():
    values, limits = torch.randn(MANY, generator=torch.Generator().manual_seed(4)), MIDDLES * 0.75
    names = names_of(limits)
    with torch.inference_mode():
        first = named(values, limits, names)
    assert torch.equal(first, named(values.requires_grad_(), limits, names))


@pytest.mark.parametrize("levels", [1, 2, 5, 16, 17, 256])
def test_two_codes_at_a_time(levels):
    generator = torch.Generator().manual_seed(levels)
    table = torch.randn(levels, generator=generator)
    table[0] = -0.0
    codes = torch.randint(levels, (300, 201), generator=generator, dtype=torch.uint8)
    wide = torch.randint(levels, (9000, 4), generator=generator, dtype=torch.uint8)
    parts = (
        wide[:, :1],
        wide[:, ::2],
        codes,
        codes[1:],
        codes[:, 1:],
        codes.T,
        codes[:10],
        codes.view(-1)[1:],
        codes.view(-1)[1:-1],
    )
    for some in parts:
        found = decoded(table, some)
        assert found.shape == some.shape
        assert torch.equal(found.view(torch.int32), table[some.long()].view(torch.int32))
    with torch.device("meta"):
        assert torch.equal(decoded(table * 2, codes), (table * 2)[codes.long()])


@pytest.mark.parametrize("levels", [Table(NF4), Table(NF4.flip(0)), Float4()], ids=["nf4", "falling", "float4"])
def test_many_are_encoded_as_few_are(levels):
    values = awkward(LIMITS["nf4"] if levels.reach == 1.0 else torch.tensor([0.25, 0.75, 1.25, 2.5, 3.5, 5.0]))
    one_by_one = torch.cat([levels.encode(part) for part in values.split(1000)])
    assert torch.equal(levels.encode(values), one_by_one)
