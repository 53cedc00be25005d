"""Block-diagonal products as operators of torch: three, and the gradient of each is made of the other two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oftfx.kernels.launch import is_interpreted, on_device_of
from oftfx.rotation.autocast import product_dtype
from oftfx.rotation.triton.kernels import gather_kernel, outer_kernel, spread_kernel
from oftfx.rotation.triton.tiles import Tiling, splits

INTERPRETED = is_interpreted(spread_kernel)


def rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """`oftfx.rotation.rotate` by one kernel, which reads ``x`` once and writes the result once."""
    return spread(x.to(product_dtype(x)), blocks)[0]


def rotate_jointly(x: Tensor, blocks: Tensor) -> tuple[Tensor, ...]:
    """`oftfx.rotation.rotate.rotate_jointly` by one kernel."""
    return tuple(spread(x.to(product_dtype(x)), blocks))


@torch.library.custom_op("oftfx::spread", mutates_args=(), schema="(Tensor x, Tensor blocks) -> Tensor[]")
def spread(x: Tensor, blocks: Tensor) -> list[Tensor]:
    """``y_i = x @ blockdiag(R_i)``.

    Args:
        x: ``(..., n)``, of any strides; float32, bfloat16 or float16.
        blocks: ``(n / b, b, count * b)`` of any strides and of any of these dtypes.

    Returns:
        ``count`` contiguous tensors of the shape and dtype of ``x``.
    """
    groups, size, width = blocks.shape
    ys = [x.new_empty(x.shape) for _ in range(width // size)]
    if x.numel():
        flat = x.reshape(-1, groups * size)
        rows, n = flat.shape
        t = Tiling.of(rows, groups, size, x.dtype)
        with on_device_of(x):
            spread_kernel[(-(-rows // t.height) * t.tiles,)](
                flat, tuple(ys), blocks, rows, n, *flat.stride(), *blocks.stride(),
                len(ys), size, t.per, t.parts, t.tiles, t.width, t.height, INTERPRETED,
            )  # fmt: skip
    return ys


@torch.library.custom_op("oftfx::gather", mutates_args=(), schema="(Tensor[] ys, Tensor blocks) -> Tensor")
def gather(ys: list[Tensor], blocks: Tensor) -> Tensor:
    """``x = sum_i y_i @ blockdiag(R_i)^T``; shapes and dtypes as in `spread`."""
    groups, size, _ = blocks.shape
    x = ys[0].new_empty(ys[0].shape)
    if x.numel():
        n = groups * size
        rows = x.numel() // n
        t = Tiling.of(rows, groups, size, x.dtype)
        with on_device_of(x):
            gather_kernel[(-(-rows // t.height) * t.tiles,)](
                tuple(y.contiguous() for y in ys), x, blocks, rows, n, *blocks.stride(),
                len(ys), size, t.per, t.parts, t.tiles, t.width, t.height, INTERPRETED,
            )  # fmt: skip
    return x


@torch.library.custom_op(
    "oftfx::outer", mutates_args=(), schema="(Tensor x, Tensor[] ys, SymInt size, ScalarType dtype) -> Tensor"
)
def outer(x: Tensor, ys: list[Tensor], size: int, dtype: torch.dtype) -> Tensor:
    """Blocks ``x_b^T y_i,b``, summed over all rows in float32, in an order that depends on the shapes only.

    Args:
        x: ``(..., n)``.
        ys: ``count`` tensors ``(..., n)``.
        size: ``b``.
        dtype: of the result.

    Returns:
        ``(n / b, b, count * b)``.
    """
    groups, shape = x.shape[-1] // size, (x.shape[-1] // size, size, len(ys) * size)
    if not x.numel():
        return x.new_zeros(shape, dtype=dtype)
    flat = x.reshape(-1, groups * size)
    rows, n = flat.shape
    t = Tiling.of(rows, groups, size, x.dtype)
    pairs = t.tiles * t.parts
    step = min(t.height, t.width)  # rows at a time; in float32, more do not fit in registers
    run = -(-rows // splits(rows, pairs))
    run = -(-run // step) * step
    runs = -(-rows // run)
    sums = x.new_empty((runs, *shape), dtype=torch.float32)
    with on_device_of(x):
        outer_kernel[(pairs, runs)](
            flat, tuple(y.contiguous() for y in ys), sums, rows, run, n, *flat.stride(), sums.stride(0),
            len(ys), size, t.per, t.parts, t.width, step, INTERPRETED,
        )  # fmt: skip
    return (sums.sum(0) if runs > 1 else sums[0]).to(dtype)


@spread.register_fake
def _(x: Tensor, blocks: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape) for _ in range(blocks.shape[2] // blocks.shape[1])]


@gather.register_fake
def _(ys: list[Tensor], blocks: Tensor) -> Tensor:
    return ys[0].new_empty(ys[0].shape)


@outer.register_fake
def _(x: Tensor, ys: list[Tensor], size: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[-1] // size, size, len(ys) * size), dtype=dtype)


def _keep_spread(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, blocks = inputs
    # What no gradient is asked of keeps nothing alive.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, blocks if ctx.needs_input_grad[0] else None)
    ctx.size, ctx.dtype = blocks.shape[1], blocks.dtype


def _spread_backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    x, blocks = ctx.saved_tensors
    of_x, of_blocks = ctx.needs_input_grad
    return gather(grads, blocks) if of_x else None, outer(x, grads, ctx.size, ctx.dtype) if of_blocks else None


def _keep_gather(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ys, blocks = inputs
    ctx.save_for_backward(blocks, *ys)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor | None], Tensor | None]:
    blocks, *ys = ctx.saved_tensors
    of_ys, of_blocks = ctx.needs_input_grad
    parts: list[Tensor | None] = list(spread(grad, blocks)) if any(of_ys) else [None] * len(ys)
    return parts, outer(grad, ys, blocks.shape[1], blocks.dtype) if of_blocks else None


def _keep_outer(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, ys, *_ = inputs
    ctx.save_for_backward(x, *ys)


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, list[Tensor | None], None, None]:
    x, *ys = ctx.saved_tensors
    of_x, of_ys, *_ = ctx.needs_input_grad
    parts: list[Tensor | None] = list(spread(x, grad)) if any(of_ys) else [None] * len(ys)
    return gather(ys, grad) if of_x else None, parts, None, None


spread.register_autograd(_spread_backward, setup_context=_keep_spread)
gather.register_autograd(_gather_backward, setup_context=_keep_gather)
outer.register_autograd(_outer_backward, setup_context=_keep_outer)
