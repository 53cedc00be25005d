"""Logarithms, angles and roots of rotations, in float64: each by one eigendecomposition of a whole batch of blocks.

A skew-symmetric L is normal: with ``-iL = V diag(t) V^H`` Hermitian, ``exp(L)`` has the eigenvalues ``e^(it)``, and
the Cayley transform ``(I - Q)(I + Q)^-1`` equals it for ``Q = V diag(-i tan(t / 2)) V^H``. So both directions are
functions of a Hermitian matrix, and equal eigenvalues need no care.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEAREST_PI = 1e-6
"""How near to pi an angle may be. There the logarithm loses as many digits as its distance from pi has zeros."""
_NEAR, _STEPS = 0.1, 6
"""So near to a rotation so many steps, each of which squares the distance, leave rounding only."""


def nearest_rotation(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The orthogonal matrix nearest to each block, and how far the block is from it.

    Args:
        blocks: ``(blocks, b, b)`` float64, finite.

    Returns:
        The orthogonal factor ``(blocks, b, b)`` of the polar decomposition; and ``max |s - 1| (blocks,)`` over the
        singular values s: the factor by which a block stretches some vector, less one.

    Source: polar decomposition and the iteration of Newton and Schulz; Higham, Functions of Matrices (2008), chapter 8.
    """
    gram = blocks.mT @ blocks
    departure = (torch.linalg.eigvalsh(gram).clamp(min=0).sqrt() - 1).abs().amax(-1)
    if not bool((departure < _NEAR).all()):
        left, _, right = torch.linalg.svd(blocks)
        return left @ right, departure
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    for _ in range(_STEPS):
        blocks = blocks @ (1.5 * eye - 0.5 * gram)
        gram = blocks.mT @ blocks
    return blocks, departure


def angles_of(rotations: Tensor) -> Tensor:
    """Angles ``|arg|`` of the eigenvalues of each block ``(blocks, b)`` in [0, pi], ascending.

    Eigenvalues are in conjugate pairs, so each plane's angle is there twice. By the singular values of ``R - I``, which
    are ``2 sin(t / 2)``, and of ``R + I``, ``2 cos(t / 2)``: together as accurate near 0 as near pi.

    Args:
        rotations: ``(blocks, b, b)`` float64, orthogonal.
    """
    eye = torch.eye(rotations.shape[-1], dtype=rotations.dtype, device=rotations.device)
    sines = torch.linalg.svdvals(rotations - eye).flip(-1)
    cosines = torch.linalg.svdvals(rotations + eye)
    return 2 * torch.atan2(sines, cosines)


def logarithm(rotations: Tensor) -> tuple[Tensor, Tensor]:
    """The skew-symmetric ``L`` with ``exp(L) = R`` and angles below pi.

    Args:
        rotations: ``(blocks, b, b)`` float64, orthogonal.

    Returns:
        ``L (blocks, b, b)``, and the largest angle of each block ``(blocks,)``. Where that is pi there is no such L, or
        there are several, and what is returned is none; see `NEAREST_PI`.

    Source: principal logarithm of a normal matrix; Higham, Functions of Matrices (2008), sections 1.4 and 11.
    """
    eye = torch.eye(rotations.shape[-1], dtype=rotations.dtype, device=rotations.device).expand_as(rotations)
    # (I - R) and (I + R)^-1 commute. Large entries stand for angles near pi, where the logarithm is as sensitive.
    q, failed = torch.linalg.solve_ex(rotations + eye, eye - rotations, check_errors=False)
    there = (failed == 0) & torch.isfinite(q).flatten(1).all(1)
    values, vectors = torch.linalg.eigh(-1j * _skew(torch.where(there.view(-1, 1, 1), q, 0.0)))
    angles = -2 * torch.atan(values)
    largest = torch.where(there, angles.abs().amax(-1), math.pi)
    return _from_angles(angles, vectors), largest


def cayley_root(logarithms: Tensor) -> tuple[Tensor, Tensor]:
    """The skew-symmetric ``Q`` with ``(I - Q)(I + Q)^-1 = exp(L)``.

    Args:
        logarithms: ``(blocks, b, b)`` float64, skew-symmetric, of any size.

    Returns:
        ``Q (blocks, b, b)``, and the largest angle of ``exp(L)`` in [0, pi] ``(blocks,)``. Where that is pi there is no
        Q.
    """
    values, vectors = torch.linalg.eigh(-1j * _skew(logarithms))
    turns = torch.remainder(values + math.pi, 2 * math.pi).sub_(math.pi).abs_()
    return _from_angles(-torch.tan(values / 2), vectors), turns.amax(-1)


def joined(blocks: Tensor, size: int) -> Tensor:
    """Blocks ``(n / b, b, b)`` as the larger ones ``(n / size, size, size)`` that have them on their diagonal."""
    count, b, _ = blocks.shape
    if size == b:
        return blocks
    several = size // b
    result = blocks.new_zeros(count // several, several, b, several, b)
    places = torch.arange(several, device=blocks.device)
    result[:, places, :, places, :] = blocks.unflatten(0, (-1, several)).transpose(0, 1)
    return result.view(count // several, size, size)


def _from_angles(values: Tensor, vectors: Tensor) -> Tensor:
    """``V diag(i t) V^H``, which is real."""
    return _skew(-((vectors * values.unsqueeze(-2)) @ vectors.mH).imag)


def _skew(matrix: Tensor) -> Tensor:
    return (matrix - matrix.mT) / 2
