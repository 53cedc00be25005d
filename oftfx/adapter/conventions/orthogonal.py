"""Say any orthogonal matrix as a skew by the Cayley transform, and find the skew of a rotation again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from oftfx.adapter.conventions.base import Turn
from oftfx.errors import AdapterError, AdapterFileError
from oftfx.rotation.cayley import cayley, project
from oftfx.rotation.module import Rotation, whole
from oftfx.rotation.skew import skew_matrix, skew_vector
from oftfx.rotation.spec import OFT

BOUND = 1e-6
"""Largest relative error of a rotation that is made again from its skew in float32."""


def inverse_cayley(r: Tensor) -> Tensor:
    """``Q = (I - R)(I + R)^-1``, float64, of orthogonal ``r (blocks, b, b)`` without an eigenvalue of -1."""
    eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    q = torch.linalg.solve_ex(eye + r, eye - r)[0]  # both commute
    return (q - q.transpose(-1, -2)) / 2


def signs_for(r: Tensor) -> Tensor:
    """Signs ``d (blocks, b)`` so that ``R @ diag(d)`` has no eigenvalue of -1; of any orthogonal matrix.

    ``det(I + R D) = 0`` just where ``det(R + D) = 0``: eliminate in ``R + D`` and give each pivot the sign that it has,
    so that none is smaller than 1.
    """
    rest, signs = r.clone(), torch.ones(r.shape[:-1], dtype=r.dtype, device=r.device)
    for i in range(r.shape[-1]):
        pivot = rest[:, i, i]
        signs[:, i] = torch.where(pivot < 0, -1.0, 1.0)
        pivot = pivot + signs[:, i]
        factor = rest[:, i + 1 :, i] / pivot[:, None]
        rest[:, i + 1 :, i + 1 :] -= factor[:, :, None] * rest[:, i, None, i + 1 :]
    return signs


def turn_of(r: Tensor, where: str, *, side: Literal["input", "output"] = "input", scale: Tensor | None = None) -> Turn:
    """A layer's turn by any orthogonal blocks ``r (blocks, b, b)``, float64: as a skew, with signs where one needs
    them.

    Raises:
        AdapterFileError: not orthogonal, or float32 cannot hold it within `BOUND`.
    """
    eye = torch.eye(r.shape[-1], dtype=r.dtype)
    defect = float(torch.linalg.matrix_norm(r @ r.transpose(1, 2) - eye).max())
    if not defect <= BOUND:
        raise AdapterFileError(f"{where}: what it describes is no rotation: R R^T differs from I by {defect:.2g}")
    spec = OFT(r.shape[-1], parameterization="cayley")
    skew = skew_vector(inverse_cayley(r))
    if _error(skew, r) <= BOUND:
        return Turn(spec, skew, side, scale=scale)
    # Signs act on the weight before the rotation does: R = C D on the side of inputs, R = D C on the other.
    given = r if side == "input" else r.transpose(1, 2)
    signs = signs_for(given)
    turned = given * signs[:, None, :]
    turned = turned if side == "input" else turned.transpose(1, 2)
    skew = skew_vector(inverse_cayley(turned))
    if not (error := _error(skew, turned)) <= BOUND:
        raise AdapterFileError(f"{where}: as a Cayley transform in float32 it would be off by a relative {error:.2g}")
    return Turn(spec, skew, side, signs.flatten(), scale)


def blocks_of_skew(q: Tensor) -> Tensor:
    """``(I - Q)(I + Q)^-1`` of ``q (..., b, b)``."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(eye + q, eye - q)


def butterfly(factors: Tensor, order: Callable[[int], Tensor], where: str) -> Tensor:
    """Blocks of ``F_m ... F_1`` for BOFT's ``factors (m, k, b, b)``, ``(F v)[order] = diag(factor) v[order]``.

    Args:
        factors: orthogonal, float64.
        order: for each factor's number the permutation in which it reads; it stays within groups of ``b * 2^i``.
        where: for the message.

    Returns:
        ``(groups, b 2^(m-1), b 2^(m-1))``, dense.

    Raises:
        AdapterFileError: the numbers do not make up such groups.
    """
    count, blocks, size, _ = factors.shape
    wide, length = size * 2 ** (count - 1), blocks * size
    if (count > 1 and size % 2) or length % wide:
        raise AdapterFileError(
            f"{where}: {count} factors with blocks of {size} turn groups of {wide}; {length} numbers do not consist "
            "of such"
        )
    product = torch.eye(wide, dtype=factors.dtype).repeat(length // wide, 1)
    for i, factor in enumerate(factors):
        read = order(i)
        turned = torch.bmm(factor, product[read].unflatten(0, (blocks, size))).flatten(0, 1)
        product = torch.empty_like(turned).index_copy_(0, read, turned)
    return product.unflatten(0, (-1, wide))


def _error(skew: Tensor, r: Tensor) -> float:
    if not torch.isfinite(skew.float()).all():
        return float("inf")
    made = cayley(skew.float(), r.shape[-1], "cayley").double()
    return float((made - r).norm() / r.norm())


def exact_skew(rotation: Rotation, fqn: str, convention: str) -> Tensor:
    """``Q (blocks, b, b)``, float64, of the exact Cayley transform that gives a rotation's blocks.

    Raises:
        AdapterError: the rotation is a truncated series, which is orthogonal in the beginning only, and is too far from
            an orthogonal matrix by now.
    """
    skew, spec, size = whole(rotation.skew).detach().cpu().double(), rotation.spec, rotation.block_size
    if spec.parameterization == "cayley":
        q = skew_matrix(skew, size)
        return rotation.spread(q if spec.coft_eps is None else project(q, spec.coft_eps))
    r = rotation.recipe(skew)
    q = inverse_cayley(r)
    made = blocks_of_skew(q)
    if not (error := float((made - r).norm() / r.norm())) <= BOUND:
        raise AdapterError(
            f"{fqn}: convention {convention!r} has exact rotations; this one is a series ({spec.parameterization}, "
            f"{spec.terms} terms) and off from any by a relative {error:.2g}. Train with "
            "OFT(parameterization='cayley') to write it"
        )
    return q
