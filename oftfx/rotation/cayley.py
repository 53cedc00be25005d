"""The Cayley transform: from a skew-symmetric matrix to a rotation."""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from oftfx.rotation.autocast import without_autocast
from oftfx.rotation.ieee import ieee_products
from oftfx.rotation.remade import remade
from oftfx.rotation.skew import skew_matrix
from oftfx.rotation.triton import choose

Parameterization = Literal["cayley_neumann", "cayley", "cayley_neumann_016"]
PARAMETERIZATIONS: tuple[str, ...] = get_args(Parameterization)


def cayley(
    skew: Tensor,
    block_size: int,
    parameterization: Parameterization = "cayley_neumann",
    terms: int = 5,
    coft_eps: float | None = None,
) -> Tensor:
    """Turn trainable skew entries into the blocks of a rotation.

    With ``Q`` the skew-symmetric matrix of `skew_matrix`:

    * ``cayley``: ``R = (I - Q)(I + Q)^-1``, orthogonal to rounding;
    * ``cayley_neumann``: ``R = I + 2Q + 2Q^2 + ... + 2Q^(m-1) + Q^m``, a truncated series of
      ``(I + Q)(I - Q)^-1`` (the *transpose* of the exact form). ``terms`` 1, 2, 3, 4, 5, ... give the highest
      power ``m`` = 0, 1 (factor 2), 3, 3, 4, ...; orthogonal only while Q is small;
    * ``cayley_neumann_016``: ``R = I + 2Q + ... + 2Q^(terms-1)``, as PEFT 0.16 and 0.17 meant the same file.

    Args:
        skew: ``(blocks, b (b - 1) / 2)``, any float dtype.
        block_size: ``b``.
        parameterization: one of the three above.
        terms: terms of the series; ignored by ``cayley``.
        coft_eps: constrained OFT. The Frobenius norm of each ``Q`` is clipped to ``coft_eps / sqrt(blocks)``.

    Returns:
        ``(blocks, b, b)`` in float32 or wider, so that a bfloat16 model still gets an accurate rotation.

    Raises:
        ValueError: unknown parameterization, or a wrong shape.

    Source: OFT, arXiv 2306.07280 eq. 2; OFTv2, arXiv 2506.19847 section 4; meaning of the file keys as PEFT 0.21.
    """
    if has_torch_function_unary(skew):  # a recorder sees one node, not the dozen operations below
        return handle_torch_function(
            cayley,
            (skew,),
            skew,
            block_size,
            parameterization=parameterization,
            terms=terms,
            coft_eps=coft_eps,
        )
    series = _series(parameterization, terms)
    wide = torch.promote_types(skew.dtype, torch.float32)
    # Autocast would run the small products in half precision.
    with without_autocast(skew.device), ieee_products():
        skew = skew.to(wide)
        if series is not None and coft_eps is None and choose.possible(skew):
            double, single = series
            if choose.makes_series(skew, block_size, double, single, partial(_in_torch, block_size, series, None)):
                from oftfx.rotation.triton.cayley import cayley_series

                return cayley_series(skew, block_size, double, single)
        if parameterization in PARAMETERIZATIONS:
            return remade(partial(_in_torch, block_size, series, coft_eps), skew)
    raise ValueError(f"unknown parameterization {parameterization!r}, expected one of {PARAMETERIZATIONS}")


def _in_torch(block_size: int, series: tuple[int, bool] | None, coft_eps: float | None, skew: Tensor) -> Tensor:
    # Once more around: backward makes this again, with autocast and settings of its own.
    with without_autocast(skew.device), ieee_products():
        q = skew_matrix(skew, block_size)
        if coft_eps is not None:
            q = project(q, coft_eps)
        eye = torch.eye(block_size, dtype=skew.dtype, device=skew.device).expand_as(q)
        if series is not None:
            return _neumann(q, eye, *series)
        # (I - Q) and (I + Q)^-1 commute, so the left solve is the same matrix.
        # I + Q is never singular, so nobody has to wait for the device to say so.
        return torch.linalg.solve_ex(eye + q, eye - q, check_errors=False)[0]


def project(q: Tensor, eps: float) -> Tensor:
    """Clip the Frobenius norm of each block of ``q (blocks, b, b)`` to ``eps / sqrt(blocks)``.

    Source: constrained OFT, arXiv 2306.07280 section 4; norm and scale as PEFT 0.21.
    """
    limit = eps / q.shape[0] ** 0.5
    norm = torch.linalg.matrix_norm(q, keepdim=True)
    # Where nothing is clipped the value must stay bit for bit; the inner `where` keeps 0/0 out of the gradient.
    clipped = q * (limit / torch.where(norm > limit, norm, torch.ones_like(norm)))
    return torch.where(norm > limit, clipped, q)


def _series(parameterization: str, terms: int) -> tuple[int, bool] | None:
    """Of a truncated series: the highest power with factor 2, and whether the next one follows with factor 1."""
    if parameterization == "cayley_neumann_016":
        return terms - 1, False
    if parameterization != "cayley_neumann":
        return None
    # PEFT's loop bounds.
    return (max(0, terms - 1), False) if terms <= 2 else (max(2, terms - 2), True)


def _neumann(q: Tensor, eye: Tensor, double: int, single: bool) -> Tensor:
    """``I + 2Q + ... + 2Q^double (+ Q^(double+1))`` by Horner's rule: no power is stored for the backward pass."""
    if double <= 0:
        return eye + 0 * q
    inner = q + 2 * eye if single else 2 * eye
    for _ in range(double - 1):
        inner = torch.baddbmm(2 * eye, q, inner)
    return torch.baddbmm(eye, q, inner)
