"""Rotations whose input is not kept for backward, but made again from what is kept anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oftfx.rotation.autocast import product_dtype, without_autocast
from oftfx.rotation.remade import is_plain, maker_of
from oftfx.rotation.triton import choose


def without_input(x: Tensor, blocks: Tensor, in_torch: Callable[[Tensor, Tensor], Any]) -> tuple[Tensor, ...] | None:
    """``y_i = x @ blockdiag(R_i)`` in training; None where the input has to be kept.

    Args:
        x: ``(..., n)``.
        blocks: ``(n / b, b, count * b)``.
        in_torch: makes the ``count`` results by torch's own operators.
    """
    if not (torch.is_grad_enabled() and x.requires_grad and blocks.requires_grad) or not is_plain(x, blocks):
        return None
    make = maker_of(x) if product_dtype(x) == x.dtype else None
    if make is None:
        return None
    by_triton = choose.possible(x) and choose.rotates(x, blocks, in_torch)
    result: tuple[Tensor, ...] = _Turned.apply(x, blocks.to(x.dtype), make, None if by_triton else in_torch)  # type: ignore[no-untyped-call]
    return result


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor, make: Callable[[], Tensor], in_torch: Any) -> Any:
        ctx.make, ctx.by_triton = make, in_torch is None
        ctx.save_for_backward(blocks)
        if in_torch is None:
            from oftfx.rotation.triton.rotate import spread

            return tuple(spread(x, blocks))
        ys = in_torch(x, blocks)
        return ys if isinstance(ys, tuple) else (ys,)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (blocks,) = ctx.saved_tensors
        of_x, of_blocks, *_ = ctx.needs_input_grad
        with without_autocast(blocks.device):
            x = ctx.make() if of_blocks else None
            products = _in_triton if ctx.by_triton else _in_torch
            return *products(x, grads, blocks, of_x), None, None


def _in_torch(x: Tensor | None, grads: tuple[Tensor, ...], blocks: Tensor, of_x: bool) -> tuple[Any, Any]:
    groups, size, _ = blocks.shape
    parts = [g.reshape(-1, groups, size).transpose(0, 1) for g in grads]
    beside = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
    back = torch.bmm(beside, blocks.transpose(1, 2)).transpose(0, 1).reshape(grads[0].shape) if of_x else None
    return back, None if x is None else torch.bmm(x.reshape(-1, groups, size).permute(1, 2, 0), beside)


def _in_triton(x: Tensor | None, grads: tuple[Tensor, ...], blocks: Tensor, of_x: bool) -> tuple[Any, Any]:
    from oftfx.rotation.triton.rotate import gather, outer

    back = gather(list(grads), blocks) if of_x else None
    return back, None if x is None else outer(x, list(grads), blocks.shape[1], blocks.dtype)
