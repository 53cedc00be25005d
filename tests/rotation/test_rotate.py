import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oftfx.rotation import cayley, rotate, rotate_weight, skew_size
from tests.reference import dense_rotation, rel


@settings(deadline=None, max_examples=60)
@given(
    leading=st.lists(st.integers(0, 4), max_size=4),
    blocks=st.integers(1, 6),
    size=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_rotate_equals_the_dense_product_for_any_leading_axes(leading, blocks, size, seed):
    generator = torch.Generator().manual_seed(seed)
    skew = torch.randn(blocks, skew_size(size), generator=generator, dtype=torch.float64) * 0.3
    x = torch.randn(*leading, blocks * size, generator=generator, dtype=torch.float64)
    got = rotate(x, cayley(skew, size, "cayley"))
    expected = x @ dense_rotation(skew, size, parameterization="cayley")
    assert got.shape == x.shape
    assert torch.allclose(got, expected, atol=1e-12)


def test_rotate_takes_inputs_of_any_stride():
    skew = torch.randn(3, skew_size(4))
    base = torch.randn(12, 5, 2).permute(2, 1, 0)
    assert not base.is_contiguous()
    blocks = cayley(skew, 4, "cayley")
    assert torch.equal(rotate(base, blocks), rotate(base.contiguous(), blocks))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_the_product_runs_in_the_dtype_of_the_activation(dtype, bound):
    skew = torch.randn(5, skew_size(6)) * 0.1
    x = torch.randn(3, 7, 30).to(dtype)
    got = rotate(x, cayley(skew, 6))
    assert got.dtype == dtype
    assert rel(got, x.double() @ dense_rotation(skew, 6)) < bound


def test_gradcheck():
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    blocks = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rotate, (x, blocks))
    assert torch.autograd.gradgradcheck(rotate, (x, blocks))


@pytest.mark.parametrize(("out", "blocks", "size"), [(7, 3, 5), (1, 1, 32), (33, 4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folding_a_weight_is_rotating_its_input(out, blocks, size, dtype):
    skew = torch.randn(blocks, skew_size(size), dtype=torch.float64) * 0.2
    weight = torch.randn(out, blocks * size, dtype=dtype)
    folded = rotate_weight(weight, cayley(skew, size))
    expected = weight.double() @ dense_rotation(skew, size).T
    assert folded.dtype == dtype
    assert rel(folded, expected) < (1e-15 if dtype == torch.float64 else 2e-7)


def test_a_bfloat16_weight_is_folded_in_float32():
    weight = torch.randn(5, 12).bfloat16()
    skew = torch.randn(3, skew_size(4)) * 0.2
    folded = rotate_weight(weight, cayley(skew, 4))
    assert folded.dtype == torch.float32
    assert rel(folded, weight.double() @ dense_rotation(skew, 4).T) < 2e-7
