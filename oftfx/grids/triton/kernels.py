"""Triton's kernel for error-compensated rounding: one program rounds all columns of a block, of some rows.

A program keeps the block's weights in its registers. Of each column in turn it finds the codes, and takes what their
error does to the later columns off these. Divisions and roundings are IEEE's, products are not fused with sums, and a
product in 16 bits is one in float32 (where it is exact) that is rounded once: so every step is that of torch's
operators.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _nearest_even(x: tl.tensor) -> tl.tensor:
    """Of numbers that fit in an int32."""
    floor = tl.floor(x)
    rest = x - floor
    up = (rest > 0.5) | ((rest == 0.5) & ((floor.to(tl.int32) & 1) == 1))
    return tl.where(up, floor + 1.0, floor)


@triton.jit
def _as(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """A float32 rounded to a narrower type, as float32. Of bfloat16 by hand: Triton's interpreter cuts bits off."""
    result = x
    if dtype == "float16":
        result = x.to(tl.float16).to(tl.float32)
    if dtype == "bfloat16":
        bits = x.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        result = tl.where(x == x, even.to(tl.float32, bitcast=True), x)
    return result


@triton.jit
def columns_kernel(
    rest: tl.tensor,
    upper: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    limits: tl.tensor,
    names: tl.tensor,
    levels: tl.tensor,
    codes: tl.tensor,
    errors: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    rest_column: tl.tensor,
    upper_row: tl.tensor,
    upper_column: tl.tensor,
    constant: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    few: tl.tensor,
    zero: tl.constexpr,
    table: tl.constexpr,
    signed: tl.constexpr,
    product: tl.constexpr,
    rounded: tl.constexpr,
    width: tl.constexpr,
    height: tl.constexpr,
) -> None:
    """Codes and errors ``(columns, rows)`` of a block ``rest (columns, rows)``; scales and zeros are of this shape too.

    ``zero``: "none", "constant", "each" (in units of a code) or "shift" (in units of the weight). Without ``table``,
    codes are the integers from ``low`` to ``high``; with it ``names[n]``, n of the ``limits`` being below a value, or,
    ``signed``, below its magnitude, and the sign is bit 3.
    """
    row = tl.program_id(0) * height + tl.arange(0, height)
    here = row < rows
    row = row.to(tl.int64)
    column = tl.arange(0, width)
    inside = (column < columns)[:, None] & here[None, :]
    place = column[:, None] * rest_column + row[None, :]
    tile = tl.load(rest + place, mask=inside, other=0.0)
    for j in range(columns):
        at = j * rows + row
        # As whole numbers: a sum with zeros would lose the sign of a zero.
        bits = tl.where(column[:, None] == j, tile.to(tl.int32, bitcast=True), 0)
        weight = tl.sum(bits, axis=0).to(tl.float32, bitcast=True)
        scale = tl.load(scales + at, mask=here, other=1.0)
        offset = scale
        if zero == "each" or zero == "shift":
            offset = tl.load(zeros + at, mask=here, other=0.0)
        if zero == "shift":
            value = tl.div_rn(weight + offset, scale)
        else:
            value = tl.div_rn(weight, scale)
        if zero == "each":
            value = value + offset
        if zero == "constant":
            value = value + constant

        if table:
            asked = value
            if signed:
                asked = tl.abs(value)
            index = tl.zeros((height,), tl.int32)
            for i in range(few):
                index += tl.where(asked <= tl.load(limits + i), 0, 1)  # not a number is above all
            code = tl.load(names + index).to(tl.int32)
            if signed:
                code += tl.where(value.to(tl.int32, bitcast=True) < 0, 8, 0)
            level = tl.load(levels + code)
        else:
            # Halves are no whole numbers, so rounding may come after clamping.
            level = _nearest_even(tl.minimum(tl.maximum(value, low), high))
            code = level.to(tl.int32)
        tl.store(codes + at, code.to(codes.dtype.element_ty), mask=here)

        if zero == "each":
            level = level - offset
        if zero == "constant":
            level = level - constant
        level = _as(_as(level, product) * _as(scale, product), product)
        if zero == "shift":
            level = _as(level - _as(offset, product), product)
        error = tl.div_rn(weight - _as(level, rounded), tl.load(upper + j * (upper_row + upper_column)))
        tl.store(errors + at, error, mask=here)
        later = (column > j) & (column < columns)
        factor = tl.load(upper + j * upper_row + column * upper_column, mask=later, other=0.0)
        tile = tl.where(later[:, None], tile - factor[:, None] * error[None, :], tile)
