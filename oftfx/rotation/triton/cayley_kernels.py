"""Triton's kernels for the series of the Cayley transform: one program a block, all of it in one tile, in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _skew(skew: tl.tensor, size: tl.constexpr, width: tl.constexpr) -> tl.tensor:
    """``Q`` of one row of ``skew``, zero in what is masked, and the identity."""
    row, column = tl.arange(0, width)[:, None], tl.arange(0, width)[None, :]
    low, high = tl.minimum(row, column), tl.maximum(row, column)
    place = low * (2 * size - low - 1) // 2 + (high - low - 1)
    value = tl.load(skew + place, mask=(low < high) & (high < size), other=0.0)
    return tl.where(row < column, value, -value), tl.where(row == column, 1.0, 0.0)


@triton.jit
def series_kernel(
    skew: tl.tensor,
    blocks: tl.tensor,
    entries: tl.tensor,
    size: tl.constexpr,
    double: tl.constexpr,
    single: tl.constexpr,
    width: tl.constexpr,
) -> None:
    """``I + 2Q + ... + 2Q^double (+ Q^(double+1))`` by Horner's rule; rows of ``skew`` and blocks are contiguous."""
    index = tl.program_id(0).to(tl.int64)
    q, eye = _skew(skew + index * entries, size, width)
    inner = 2 * eye
    if single:
        inner += q
    for _ in range(double - 1):
        inner = tl.dot(q, inner, 2 * eye, input_precision="ieee")
    result = tl.dot(q, inner, eye, input_precision="ieee")
    row, column = tl.arange(0, width)[:, None], tl.arange(0, width)[None, :]
    to = blocks + index * (size * size) + row * size + column
    tl.store(to, result, mask=(row < size) & (column < size))


@triton.jit
def series_backward_kernel(
    skew: tl.tensor,
    grad: tl.tensor,
    grad_skew: tl.tensor,
    entries: tl.tensor,
    size: tl.constexpr,
    double: tl.constexpr,
    single: tl.constexpr,
    width: tl.constexpr,
) -> None:
    """The gradient of ``skew`` from that of the blocks, contiguous.

    With ``Z = Q^T`` the gradient of ``Q`` is ``sum_t Z^t G P_(double-1-t)(Z) (+ Z^double G)``, where ``P_0 = 2I (+ Z)``
    and ``P_(j+1) = 2I + Z P_j`` are the inner values of Horner's rule, transposed. Summed by a rule like Horner's,
    upwards, so that no inner value is kept.
    """
    index = tl.program_id(0).to(tl.int64)
    q, eye = _skew(skew + index * entries, size, width)
    row, column = tl.arange(0, width)[:, None], tl.arange(0, width)[None, :]
    place = index * (size * size) + row * size + column
    g = tl.load(grad + place, mask=(row < size) & (column < size), other=0.0)
    z, inner, of_q = -q, 2 * eye, tl.zeros((width, width), tl.float32)
    if single:
        inner -= q
        of_q += g
    for _ in range(double):
        of_q = tl.dot(g, inner, tl.dot(z, of_q, input_precision="ieee"), input_precision="ieee")
        inner = tl.dot(z, inner, 2 * eye, input_precision="ieee")
    difference = of_q - tl.trans(of_q)
    entry = row * (2 * size - row - 1) // 2 + (column - row - 1)
    tl.store(grad_skew + index * entries + entry, difference, mask=(row < column) & (column < size))
