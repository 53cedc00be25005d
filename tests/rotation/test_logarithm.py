import math

import pytest
import torch

from oftfx.rotation.logarithm import (
    angles_of,
    cayley_root,
    joined,
    logarithm,
    nearest_rotation,
)

SIZES = [1, 2, 3, 5, 8, 17]


def rotation(size, angles=None, seed=0):
    """Planes of given angles in a random basis; of an odd size one axis stays."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    if angles is None:
        angles = torch.rand(size // 2, generator=generator, dtype=torch.float64) * 3
    middle = torch.eye(size, dtype=torch.float64)
    for plane, angle in enumerate(torch.as_tensor(angles, dtype=torch.float64).tolist()):
        c, s = math.cos(angle), math.sin(angle)
        middle[2 * plane : 2 * plane + 2, 2 * plane : 2 * plane + 2] = torch.tensor(
            [[c, -s], [s, c]], dtype=torch.float64
        )
    return basis @ middle @ basis.T


def dense_logarithm(r):
    """By the eigenvectors of R itself, which are only good for distinct eigenvalues."""
    values, vectors = torch.linalg.eig(r)
    return (vectors @ torch.diag(1j * values.angle()) @ torch.linalg.inv(vectors)).real


@pytest.mark.parametrize("size", SIZES)
def test_the_logarithm_is_that_of_the_definition(size):
    r = torch.stack([rotation(size, seed=seed) for seed in range(3)])
    found, largest = logarithm(r)
    assert torch.equal(found, -found.mT)
    assert (largest - torch.linalg.eigvals(r).angle().abs().amax(-1)).abs().max() < 1e-13
    assert (torch.matrix_exp(found) - r).abs().max() < 1e-13
    for one, block in zip(found, r, strict=True):
        assert (one - dense_logarithm(block)).abs().max() < 1e-12


@pytest.mark.parametrize("angles", [[0.3, 0.3, 0.3, 0.3], [0, 0, 0, 1e-9], [0, 0, 0, 0], [2.0, 2.0, 1e-6, 0]])
def test_equal_and_tiny_angles(angles):
    r = rotation(9, angles)[None]
    found, largest = logarithm(r)
    assert (torch.matrix_exp(found) - r).abs().max() < 1e-13
    assert (torch.matrix_exp(found / 2) @ torch.matrix_exp(found / 2) - r).abs().max() < 1e-13
    assert abs(float(largest) - max(angles)) < 1e-14
    expected = sorted([*angles, *angles, 0])
    assert (angles_of(r)[0] - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-14


@pytest.mark.parametrize("short", [1e-2, 1e-4, 1e-6])
def test_near_pi_it_is_as_good_as_the_problem_allows(short):
    r = rotation(7, [math.pi - short, 0.2, 1e-3])[None]
    found, largest = logarithm(r)
    assert abs(float(largest) - (math.pi - short)) < 1e-14
    # The sensitivity of the logarithm there is pi / short.
    assert (torch.matrix_exp(found) - r).abs().max() < 1e-15 * math.pi / short * 10
    assert abs(float(angles_of(r).max()) - (math.pi - short)) < 1e-14


def test_angles_up_to_pi_and_of_a_reflection():
    expected = torch.tensor([0, 0.5, 0.5, math.pi, math.pi], dtype=torch.float64)
    assert (angles_of(rotation(5, [math.pi, 0.5])[None])[0] - expected).abs().max() < 1e-14
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))[None]
    assert (angles_of(mirror)[0] - torch.tensor([0, 0, math.pi], dtype=torch.float64)).abs().max() < 1e-14


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, -1.0, 1.7, 9.0])
def test_the_cayley_transform_of_the_root_is_the_exponential(size, weight):
    logs = logarithm(torch.stack([rotation(size, seed=s) for s in range(2)]))[0] * weight
    (q, largest), eye = cayley_root(logs), torch.eye(size, dtype=torch.float64)
    assert torch.equal(q, -q.mT)
    expected = torch.matrix_exp(logs)
    assert ((eye - q) @ torch.linalg.inv(eye + q) - expected).abs().max() < 1e-11
    assert (largest - angles_of(expected).amax(-1)).abs().max() < 1e-12


@pytest.mark.parametrize("most", [1e-12, 0.03, 0.09, 0.11, 0.8])
def test_the_nearest_rotation_and_its_distance(most):
    r = rotation(5)
    stretch = torch.tensor([1.0, 1 + most / 2, 1 - most, 1.0, 1 + most / 3], dtype=torch.float64)
    other = rotation(5, seed=4)
    found, departure = nearest_rotation((r @ other @ torch.diag(stretch) @ other.T)[None])
    assert (found[0] - r).abs().max() < 1e-14
    assert abs(float(departure) - most) < 1e-14


def test_a_half_turn_and_a_reflection_have_no_logarithm():
    half = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
    mirror = torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64))
    good = rotation(3, [0.7])
    found, largest = logarithm(torch.stack([half, good, mirror, rotation(3, [math.pi], seed=3)]))
    assert (largest > math.pi - 1e-7).tolist() == [True, False, True, True]
    assert (found[1] - dense_logarithm(good)).abs().max() < 1e-14


def test_joined_blocks_are_the_same_matrix():
    blocks = torch.randn(6, 3, 3, dtype=torch.float64)
    larger = joined(blocks, 9)
    assert larger.shape == (2, 9, 9)
    assert torch.equal(torch.block_diag(*larger), torch.block_diag(*blocks))
    assert joined(blocks, 3) is blocks
