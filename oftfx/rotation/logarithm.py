"""Logarithms, angles and roots of rotations, in float64: each by one eigendecomposition of a whole batch of blocks.

A skew-symmetric L is normal: with ``-iL = V diag(t) V^H`` Hermitian, ``exp(L)`` has the eigenvalues ``e^(it)``, and
the Cayley transform ``(I - Q)(I + Q)^-1`` equals it for ``Q = V diag(-i tan(t / 2)) V^H``. So both directions are
functions of a Hermitian matrix, and equal eigenvalues need no care.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

NEAREST_PI = 1e-6
"""How near to pi an angle may be. There the logarithm loses as many digits as its distance from pi has zeros."""


def nearest_rotation(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The orthogonal matrix nearest to each block, and how far the block is from it.

    Args:
        blocks: ``(blocks, b, b)`` float64, finite.

    Returns:
        ``U V^T (blocks, b, b)`` and ``max |s - 1| (blocks,)`` over the singular values s: the factor by which a block
        stretches some vector, less one.

    Source: polar decomposition; Higham, Functions of Matrices (2008), theorem 8.4.
    """
    left, values, right = torch.linalg.svd(blocks)
    return left @ right, (values - 1).abs().amax(-1)


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


def logarithm(rotations: Tensor) -> Tensor:
    """The skew-symmetric ``L`` with ``exp(L) = R`` and angles below pi: ``(blocks, b, b)`` float64.

    Args:
        rotations: ``(blocks, b, b)`` float64, orthogonal. Where an angle is pi there is no such L, or are several.

    Source: principal logarithm of a normal matrix; Higham, Functions of Matrices (2008), sections 1.4 and 11.
    """
    eye = torch.eye(rotations.shape[-1], dtype=rotations.dtype, device=rotations.device).expand_as(rotations)
    # (I - R) and (I + R)^-1 commute. Large entries stand for angles near pi, where the logarithm is as sensitive.
    q = torch.linalg.solve(rotations + eye, eye - rotations)
    return _of_hermitian(q, lambda values: -2 * torch.atan(values))


def cayley_root(logarithms: Tensor) -> Tensor:
    """The skew-symmetric ``Q`` with ``(I - Q)(I + Q)^-1 = exp(L)``: ``(blocks, b, b)`` float64.

    Args:
        logarithms: ``(blocks, b, b)`` float64, skew-symmetric, of any size; no angle an odd multiple of pi.
    """
    return _of_hermitian(logarithms, lambda values: -torch.tan(values / 2))


def principal_angles(logarithms: Tensor) -> Tensor:
    """Angles in [0, pi] of ``exp(L)``, ``(blocks, b)`` ascending, for L of any size."""
    turns = torch.linalg.eigvalsh(-1j * _skew(logarithms))
    return torch.remainder(turns + math.pi, 2 * math.pi).sub_(math.pi).abs_().sort(-1).values


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


def _of_hermitian(matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``V diag(i f(t)) V^H`` for the skew-symmetric ``V diag(it) V^H`` and an odd f."""
    values, vectors = torch.linalg.eigh(-1j * _skew(matrix))
    made = (vectors * function(values).unsqueeze(-2)) @ vectors.mH  # i times it is real
    return _skew(-made.imag)


def _skew(matrix: Tensor) -> Tensor:
    return (matrix - matrix.mT) / 2
