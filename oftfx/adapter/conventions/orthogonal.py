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

GOOD, BOUND = 1e-6, 1e-5
"""Relative error of a rotation that is made again from its skew in float32: what is taken at once, and at most.

It grows as angles come near to 180 degrees, where the entries of the skew are unbounded.
"""


def inverse_cayley(r: Tensor) -> Tensor:
    """``Q = (I - R)(I + R)^-1``, float64, of orthogonal ``r (blocks, b, b)`` without an eigenvalue of -1."""
    eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    q = torch.linalg.solve_ex(eye + r, eye - r)[0]  # both commute
    return (q - q.transpose(-1, -2)) / 2


def signs_for(r: Tensor) -> Tensor:
    """Signs ``d (b,)`` for one orthogonal block so that ``R @ diag(d)`` is the Cayley transform of a small Q.

    With ``C = R D``, ``(I + C)^-1 = (I + Q) / 2``. Where C has an eigenvalue of -1 the diagonal of that is no half but
    unbounded, and one sign is changed there. Elsewhere the change of two signs, i and j, multiplies ``det(I + C)`` by
    ``Q_ij^2``, so with the largest entry above 1 this comes to an end.
    """
    signs = torch.ones(len(r), dtype=r.dtype)
    for _ in range(len(r)):
        m = torch.linalg.inv(r * signs + (1 + 1e-12) * torch.eye(len(r), dtype=r.dtype))
        if (largest := m.diagonal().abs()).max() > 2:
            signs[largest.argmax()] *= -1
        elif (q := (m - m.T).abs()).max() > 2:
            signs[list(divmod(int(q.argmax()), len(r)))] *= -1
        else:
            break
    return signs


def turn_of(r: Tensor, where: str, *, side: Literal["input", "output"] = "input", scale: Tensor | None = None) -> Turn:
    """A layer's turn by any orthogonal blocks ``r (blocks, b, b)``, float64: as a skew, with signs where one needs
    them.

    Raises:
        AdapterFileError: not orthogonal, or float32 cannot hold it within `BOUND`, with signs or without.
    """
    eye = torch.eye(r.shape[-1], dtype=r.dtype)
    defect = float(torch.linalg.matrix_norm(r @ r.transpose(1, 2) - eye).max())
    if not defect <= GOOD:
        raise AdapterFileError(f"{where}: what it describes is no rotation: R R^T differs from I by {defect:.2g}")
    spec = OFT(r.shape[-1], parameterization="cayley")
    skew = skew_vector(inverse_cayley(r))
    if (plain := _error(skew, r)) <= GOOD:
        return Turn(spec, skew, side, scale=scale)
    # Signs act on the weight before the rotation does: R = C D on the side of inputs, R = D C on the other.
    given = r if side == "input" else r.transpose(1, 2)
    signs = torch.stack([signs_for(block) for block in given])
    turned = given * signs[:, None, :]
    turned = turned if side == "input" else turned.transpose(1, 2)
    other = skew_vector(inverse_cayley(turned))
    error = _error(other, turned)
    if not min(plain, error) <= BOUND:
        raise AdapterFileError(
            f"{where}: it turns by angles so near to 180 degrees that its Cayley transform in float32 would be off "
            f"by a relative {min(plain, error):.2g}, more than {BOUND:g}"
        )
    if plain <= 2 * error:  # signs cost a copy of the weight
        return Turn(spec, skew, side, scale=scale)
    return Turn(spec, other, side, signs.flatten(), scale)


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
    if not (error := float((made - r).norm() / r.norm())) <= GOOD:
        raise AdapterError(
            f"{fqn}: convention {convention!r} has exact rotations; this one is a series ({spec.parameterization}, "
            f"{spec.terms} terms) and off from any by a relative {error:.2g}. Train with "
            "OFT(parameterization='cayley') to write it"
        )
    return q
