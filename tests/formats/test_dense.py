"""Float weights: what is read without a copy, what becomes the weight, and turning to the bit."""

import pytest
import torch
import torch.nn as nn

from oftfx.formats.dense import Dense
from oftfx.formats.layout import Layout
from tests.reference import dense_rotation, rel

DENSE = Dense()


def same_memory(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("layer", "borrowed"),
    [
        (nn.Linear(6, 4), True),
        (nn.Linear(6, 4).double(), True),
        (nn.Conv2d(4, 6, 3), True),
        (nn.Linear(6, 4).bfloat16(), False),
        (nn.ConvTranspose2d(4, 6, 3), False),
        (nn.Embedding(5, 6, max_norm=0.5), False),
        (nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), False),
    ],
    ids=str,
)
def test_what_is_stored_as_a_wide_matrix_is_read_without_a_copy(layer, borrowed):
    matrix, copied = DENSE.borrow(layer), DENSE.dequantize(layer)
    assert torch.equal(matrix, copied)
    assert matrix.dtype == copied.dtype
    assert same_memory(matrix, layer.weight) == borrowed
    assert not same_memory(copied, layer.weight)


@pytest.mark.parametrize(
    ("layer", "taken"),
    [
        (nn.Linear(6, 4), True),
        (nn.Conv2d(4, 6, 3), True),
        (nn.Linear(6, 4).half(), False),
        (nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), False),
        (nn.ConvTranspose2d(4, 6, 3), False),
    ],
    ids=str,
)
def test_a_matrix_that_lies_as_the_weight_does_becomes_it(layer, taken):
    matrix = torch.randn_like(DENSE.dequantize(layer))
    new = DENSE.take(matrix, layer)["weight"]
    assert torch.equal(new, DENSE.requantize(matrix, layer)["weight"])
    assert (new.dtype, new.stride(), new.shape) == (layer.weight.dtype, layer.weight.stride(), layer.weight.shape)
    assert same_memory(new, matrix) == taken
    assert not same_memory(DENSE.requantize(matrix, layer)["weight"], matrix)
    part = torch.randn(2 * len(matrix), matrix.shape[1])[: len(matrix)]  # a part of more is not kept
    assert not same_memory(DENSE.take(part, layer)["weight"], part)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_turning_at_once_is_turning_to_the_bit(side, dtype):
    layout = Layout(side=side)
    weight = torch.randn(37, 60, dtype=dtype, generator=torch.Generator().manual_seed(0))
    skews = [torch.randn(60 // b, b * (b - 1) // 2, generator=torch.Generator().manual_seed(b)) / 5 for b in (5, 12)]
    dense = [dense_rotation(s, b) for s, b in zip(skews, (5, 12), strict=True)]
    chain = [
        torch.stack([d[i : i + b, i : i + b] for i in range(0, 60, b)]).to(dtype)
        for d, b in zip(dense, (5, 12), strict=True)
    ]
    got = layout.turned_now(weight, chain)
    assert torch.equal(got, layout.turned_by(weight, chain))
    both = dense[0] @ dense[1]
    expected = weight.double() @ (both.T if side == "input" else both)
    assert rel(got, expected) < (1e-6 if dtype == torch.float32 else 1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layout.turned_now(weight, chain), got)
    columns = weight.T.contiguous().T  # not contiguous
    assert torch.equal(layout.turned_now(columns, chain), got)
