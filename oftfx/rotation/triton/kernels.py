"""Triton's kernels for products with block-diagonal matrices.

Every product is summed in float32, and that of float32 is IEEE's. Operands are rounded to the dtype of the activation
as they are read. `wide` is for Triton's interpreter, whose product takes the bits of bfloat16 for whole numbers: its
operands are made float32 after they were rounded, which changes no product.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _columns(
    group: tl.tensor, part: tl.tensor, n: tl.tensor, size: tl.constexpr, per: tl.constexpr, width: tl.constexpr
) -> tl.tensor:
    """Of each column of a tile: which it is, its block, its place there, and whether it is one."""
    inside = part * width + tl.arange(0, width)
    column = group * (per * size) + inside
    block = group * per + inside // size
    return column, block, inside % size, (inside < per * size) & (column < n)


@triton.jit
def _operand(
    tensor: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    row_stride: tl.tensor,
    column: tl.tensor,
    column_stride: tl.tensor,
    there: tl.tensor,
) -> tl.tensor:
    """A tile of an activation, zero where there is nothing."""
    place = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    return tl.load(tensor + place, mask=(row < rows)[:, None] & there[None, :], other=0.0)


@triton.jit
def _matrix(
    blocks: tl.tensor,
    block_a: tl.tensor,
    place_a: tl.tensor,
    there_a: tl.tensor,
    stride_a: tl.tensor,
    block_b: tl.tensor,
    place_b: tl.tensor,
    there_b: tl.tensor,
    stride_b: tl.tensor,
    block_stride: tl.tensor,
) -> tl.tensor:
    """A tile of the block-diagonal matrix, zero outside its blocks; ``a`` is summed over."""
    place = block_a.to(tl.int64)[:, None] * block_stride + place_a[:, None] * stride_a + place_b[None, :] * stride_b
    inside = there_a[:, None] & there_b[None, :] & (block_a[:, None] == block_b[None, :])
    return tl.load(blocks + place, mask=inside, other=0.0)


@triton.jit
def _add_product(total: tl.tensor, left: tl.tensor, right: tl.tensor, wide: tl.constexpr) -> tl.tensor:
    """``total + left @ right``."""
    right = right.to(left.dtype)
    if wide:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit(do_not_specialize=["rows"])
def spread_kernel(
    x: tl.tensor,
    ys: tl.tensor,
    blocks: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    block_stride: tl.tensor,
    in_stride: tl.tensor,
    out_stride: tl.tensor,
    count: tl.constexpr,
    size: tl.constexpr,
    per: tl.constexpr,
    parts: tl.constexpr,
    tiles: tl.constexpr,
    width: tl.constexpr,
    height: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    """``y_i = x @ blockdiag(R_i)``: ``x (rows, n)``, each ``y_i`` contiguous."""
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles) * height + tl.arange(0, height)
    group = tile // parts
    column, block, place, there = _columns(group, tile % parts, n, size, per, width)
    if parts == 1:  # read once, for all outputs
        whole = _operand(x, row, rows, x_row, column, x_column, there)
    for i in tl.static_range(count):
        of_i = blocks + i * size * out_stride
        total = tl.zeros((height, width), tl.float32)
        if parts == 1:
            right = _matrix(of_i, block, place, there, in_stride, block, place, there, out_stride, block_stride)
            total = _add_product(total, whole, right, wide)
        else:
            for part in range(parts):
                source, block_s, place_s, there_s = _columns(group, part, n, size, per, width)
                left = _operand(x, row, rows, x_row, source, x_column, there_s)
                right = _matrix(
                    of_i, block_s, place_s, there_s, in_stride, block, place, there, out_stride, block_stride
                )  # fmt: skip
                total = _add_product(total, left, right, wide)
        to = ys[i] + row.to(tl.int64)[:, None] * n + column[None, :]
        tl.store(to, total.to(ys[i].dtype.element_ty), mask=(row < rows)[:, None] & there[None, :])


@triton.jit(do_not_specialize=["rows"])
def gather_kernel(
    ys: tl.tensor,
    x: tl.tensor,
    blocks: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    block_stride: tl.tensor,
    in_stride: tl.tensor,
    out_stride: tl.tensor,
    count: tl.constexpr,
    size: tl.constexpr,
    per: tl.constexpr,
    parts: tl.constexpr,
    tiles: tl.constexpr,
    width: tl.constexpr,
    height: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    """``x = sum_i y_i @ blockdiag(R_i)^T``: all contiguous ``(rows, n)``."""
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles) * height + tl.arange(0, height)
    group = tile // parts
    column, block, place, there = _columns(group, tile % parts, n, size, per, width)
    total = tl.zeros((height, width), tl.float32)
    for i in tl.static_range(count):
        for part in range(parts):
            source, block_s, place_s, there_s = _columns(group, part, n, size, per, width)
            left = _operand(ys[i], row, rows, n, source, 1, there_s)
            of_i = blocks + i * size * out_stride
            right = _matrix(
                of_i, block_s, place_s, there_s, out_stride, block, place, there, in_stride, block_stride
            )  # fmt: skip
            total = _add_product(total, left, right, wide)
    to = x + row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(to, total.to(x.dtype.element_ty), mask=(row < rows)[:, None] & there[None, :])


@triton.jit(do_not_specialize=["rows", "run", "sums_stride"])
def outer_kernel(
    x: tl.tensor,
    ys: tl.tensor,
    sums: tl.tensor,
    rows: tl.tensor,
    run: tl.tensor,
    n: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    sums_stride: tl.tensor,
    count: tl.constexpr,
    size: tl.constexpr,
    per: tl.constexpr,
    parts: tl.constexpr,
    width: tl.constexpr,
    height: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    """Blocks ``x_b^T y_i,b``, side by side, of each run of rows: ``sums (runs, blocks, size, count * size)``."""
    pair = tl.program_id(0)
    group = pair // (parts * parts)
    column, block, place, there = _columns(group, pair // parts % parts, n, size, per, width)
    column_y, block_y, place_y, there_y = _columns(group, pair % parts, n, size, per, width)
    first = tl.program_id(1) * run
    last = tl.minimum(first + run, rows)
    inside = there[:, None] & there_y[None, :] & (block[:, None] == block_y[None, :])
    line = (block.to(tl.int64) * size + place) * (count * size)
    to = sums + tl.program_id(1).to(tl.int64) * sums_stride + line[:, None] + place_y[None, :]
    for i in tl.static_range(count):
        total = tl.zeros((width, width), tl.float32)
        for start in range(first, last, height):
            row = start + tl.arange(0, height)
            left = _operand(x, row, last, x_row, column, x_column, there)
            right = _operand(ys[i], row, last, n, column_y, 1, there_y)
            total = _add_product(total, tl.trans(left), right, wide)
        tl.store(to + i * size, total, mask=inside)
