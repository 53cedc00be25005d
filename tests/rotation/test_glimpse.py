"""A look at a few bytes sees what writes all of a tensor, and reads nothing that is not there."""

import pytest
import torch

from oftfx.rotation.glimpse import Glimpse

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 3), (7, 496), (4, 6, 3, 3)])
@pytest.mark.parametrize("write", [lambda t: t.mul_(2), lambda t: t.copy_(torch.randn_like(t)), lambda t: t.add_(1)])
def test_writes_through_data_show(dtype, shape, write):
    tensor = torch.nn.Parameter(torch.randn(shape).to(dtype))
    glimpse = Glimpse()
    before = glimpse.of(tensor)
    assert before != b""
    assert glimpse.of(tensor) == before
    write(tensor.data)
    assert glimpse.of(tensor) != before
    assert tensor._version == 0


def test_another_memory_is_looked_at_anew():
    tensor, glimpse = torch.nn.Parameter(torch.ones(64)), Glimpse()
    before = glimpse.of(tensor)
    tensor.data = torch.full((64,), 3.0)
    assert glimpse.of(tensor) != before
    tensor.data = torch.ones(64)
    assert glimpse.of(tensor) == before


def test_a_storage_that_was_made_smaller_is_not_read_past_its_end():
    tensor, glimpse = torch.nn.Parameter(torch.randn(2048, 2048)), Glimpse()
    assert glimpse.of(tensor) != b""
    tensor.untyped_storage().resize_(64)
    assert glimpse.of(tensor) == b""
    tensor.untyped_storage().resize_(0)
    assert glimpse.of(tensor) == b""


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(4, device="meta"),
        torch.ones(0),
        torch.ones(8, 8)[::2, ::2],
        torch.ones(8, 8).to_sparse().coalesce().values()[:0],
        torch.ones(1).expand(9),
    ],
)
def test_what_has_no_memory_of_its_own_is_not_looked_at(tensor):
    assert Glimpse().of(tensor) == b""


def test_channels_last_is_dense():
    tensor, glimpse = torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last), Glimpse()
    before = glimpse.of(tensor)
    assert before != b""
    tensor.data.neg_()
    assert glimpse.of(tensor) != before
