import pytest
import torch

from oftfx.adapter.conventions.orthogonal import inverse_cayley, signs_for, turn_of
from oftfx.errors import AdapterFileError
from oftfx.rotation.cayley import cayley
from tests.reference import rel


def random_orthogonal(n, seed, determinant):
    torch.manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    if (torch.linalg.det(q) > 0) != (determinant > 0):
        q[:, 0] *= -1
    return q


@pytest.mark.parametrize("n", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("determinant", [1, -1])
@pytest.mark.parametrize("side", ["input", "output"])
def test_any_orthogonal_matrix_is_signs_and_a_cayley_transform(n, determinant, side):
    for seed in range(5):
        r = random_orthogonal(n, seed, determinant)
        turn = turn_of(r[None], "here", side=side)
        made = cayley(turn.skew.float(), n, "cayley").double()[0]
        if turn.signs is not None:
            made = made * turn.signs if side == "input" else turn.signs[:, None] * made
        assert rel(made, r) <= 1e-5
        assert (turn.signs is not None) >= (determinant < 0)


@pytest.mark.parametrize(
    "r", [-torch.eye(4), torch.diag(torch.tensor([1.0, -1, -1, 1])), torch.eye(4)[[1, 0, 3, 2]]], ids=range(3)
)
def test_eigenvalues_of_minus_one(r):
    r = r.double()
    d = signs_for(r)
    q = inverse_cayley((r * d)[None])[0]
    assert q.abs().max() <= 2
    eye = torch.eye(4, dtype=torch.float64)
    assert torch.allclose((eye - q) @ torch.linalg.inv(eye + q), r * d, atol=1e-12)
    assert turn_of(r[None], "here").signs is not None


def test_a_small_turn_needs_no_signs():
    q = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)).double() * 0.3
    turn = turn_of(cayley(q, 5, "cayley"), "here")
    assert turn.signs is None
    assert rel(turn.skew, q) <= 1e-12


def test_what_is_not_orthogonal_is_refused():
    with pytest.raises(AdapterFileError, match="here: .* no rotation: .* differs from I by"):
        turn_of(torch.eye(3).double()[None] * 1.001, "here")
