import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oftfx.rotation import cayley, skew_matrix, skew_size, skew_vector
from oftfx.rotation.cayley import project
from tests.reference import dense_block, dense_skew, rel

SIZES = [1, 2, 3, 5, 8, 32]


@pytest.mark.parametrize("size", SIZES)
def test_skew_matrix_is_the_upper_triangle_row_by_row(size):
    vector = torch.randn(3, skew_size(size), dtype=torch.float64)
    q = skew_matrix(vector, size)
    for row in range(3):
        assert torch.equal(q[row], dense_skew(vector[row], size))
    assert torch.equal(skew_vector(q), vector)


def test_skew_matrix_refuses_a_wrong_length():
    with pytest.raises(ValueError, match=r"size 4 has 6 skew entries, got \(2, 5\)"):
        skew_matrix(torch.zeros(2, 5), 4)


@pytest.mark.parametrize("terms", range(1, 10))
@pytest.mark.parametrize("size", SIZES)
def test_series_equals_explicit_powers(size, terms):
    skew = torch.randn(2, skew_size(size), dtype=torch.float64) * 0.1
    expected = torch.stack([dense_block(s, size, terms=terms) for s in skew])
    assert rel(cayley(skew, size, terms=terms), expected) < 1e-14


@pytest.mark.parametrize("terms", range(1, 7))
def test_series_of_peft_016(terms):
    skew = torch.randn(2, skew_size(6), dtype=torch.float64) * 0.1
    expected = torch.stack([dense_block(s, 6, "cayley_neumann_016", terms) for s in skew])
    assert rel(cayley(skew, 6, "cayley_neumann_016", terms), expected) < 1e-14


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(1, 17),
    rows=st.integers(1, 5),
    scale=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_exact_cayley_is_orthogonal_at_any_size(size, rows, scale, seed):
    skew = torch.randn(rows, skew_size(size), generator=torch.Generator().manual_seed(seed)) * scale
    blocks = cayley(skew, size, "cayley")
    defect = (blocks @ blocks.mT - torch.eye(size)).abs().max()
    assert defect < 1e-4
    assert (torch.linalg.det(blocks.double()) - 1).abs().max() < 1e-3


def test_series_tends_to_the_transpose_of_the_exact_form():
    skew = torch.randn(3, skew_size(8), dtype=torch.float64) * 0.02
    series, exact = cayley(skew, 8, terms=30), cayley(skew, 8, "cayley")
    assert rel(series, exact.mT) < 1e-12
    assert rel(series, exact) > 1e-2


@pytest.mark.needs("peft")
@pytest.mark.parametrize("terms", range(1, 9))
@pytest.mark.parametrize("size", [2, 5, 32])
@pytest.mark.parametrize("exact", [False, True])
def test_equals_peft(size, terms, exact):
    from peft.tuners.oft.layer import OFTRotationModule

    rows = 3
    theirs = OFTRotationModule(rows, skew_size(size), size, rows * size)
    skew = torch.randn(rows, skew_size(size)) * 0.05
    expected = theirs._cayley_batch(skew, size, not exact, terms)
    got = cayley(skew, size, "cayley" if exact else "cayley_neumann", terms)
    assert rel(got, expected) <= 1e-6


@pytest.mark.parametrize("parameterization", ["cayley_neumann", "cayley", "cayley_neumann_016"])
def test_zero_skew_is_exactly_the_identity(parameterization):
    blocks = cayley(torch.zeros(3, skew_size(7)), 7, parameterization)
    assert torch.equal(blocks, torch.eye(7).expand(3, 7, 7))


@pytest.mark.parametrize("parameterization", ["cayley_neumann", "cayley"])
@pytest.mark.parametrize("eps", [None, 0.3])
def test_gradcheck(parameterization, eps):
    skew = (torch.randn(2, skew_size(5), dtype=torch.float64) * 0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: cayley(s, 5, parameterization, coft_eps=eps), (skew,))


def test_half_precision_parameters_give_float32_blocks():
    skew = (torch.randn(2, skew_size(5)) * 0.1).bfloat16()
    blocks = cayley(skew, 5, "cayley")
    assert blocks.dtype == torch.float32
    assert rel(blocks, torch.stack([dense_block(s, 5, "cayley") for s in skew])) < 1e-6


def test_autocast_does_not_lower_the_precision():
    skew = torch.randn(2, skew_size(16)) * 0.1
    plain = cayley(skew, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cayley(skew, 16), plain)


def test_unknown_parameterization():
    with pytest.raises(ValueError, match="unknown parameterization 'polar'"):
        cayley(torch.zeros(1, 1), 2, "polar")


@pytest.mark.needs("peft")
def test_coft_projection_equals_pefts():
    from peft.tuners.oft.layer import OFTRotationModule

    size, rows, eps = 6, 4, 0.5
    theirs = OFTRotationModule(rows, skew_size(size), size, rows * size)
    skew = torch.randn(rows, skew_size(size)) * torch.tensor([[1e-3], [0.01], [0.1], [1.0]])
    expected = theirs._project_batch(skew, eps=eps)
    assert rel(skew_vector(project(skew_matrix(skew, size), eps)), expected) <= 1e-6


def test_coft_leaves_what_is_inside_bit_for_bit_and_bounds_the_rest():
    q = skew_matrix(torch.randn(4, skew_size(6)) * torch.tensor([[1e-4], [1e-3], [1.0], [9.0]]), 6)
    clipped = project(q, 0.5)
    assert torch.equal(clipped[:2], q[:2])
    assert torch.allclose(torch.linalg.matrix_norm(clipped[2:]), torch.tensor(0.25), rtol=1e-6)
