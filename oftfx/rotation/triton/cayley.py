"""The series of the Cayley transform as an operator of torch: from skew entries to blocks in one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oftfx.kernels.launch import on_device_of
from oftfx.rotation.skew import skew_matrix, skew_vector
from oftfx.rotation.triton.cayley_kernels import series_backward_kernel, series_kernel
from oftfx.rotation.triton.tiles import power

WARPS = 8
"""With four, a block of 32 does not fit in registers; by what ptxas says for compute capability 8.0, 9.0 and 10.0."""


@torch.library.custom_op(
    "oftfx::cayley_series", mutates_args=(), schema="(Tensor skew, int size, int double, bool single) -> Tensor"
)
def cayley_series(skew: Tensor, size: int, double: int, single: bool) -> Tensor:
    """``I + 2Q + ... + 2Q^double``, and ``+ Q^(double+1)`` where ``single``.

    Args:
        skew: ``(rows, b (b - 1) / 2)``, float32.
        size: ``b``, at most `choose.LARGEST_SERIES`.
        double: at least 1.
        single: see above.

    Returns:
        ``(rows, b, b)``.
    """
    blocks = skew.new_empty(skew.shape[0], size, size)
    if skew.numel():
        with on_device_of(skew):
            series_kernel[(skew.shape[0],)](
                skew.contiguous(), blocks, skew.shape[1], size, double, single, power(size),
                num_warps=WARPS,
            )  # fmt: skip
    return blocks


@torch.library.custom_op(
    "oftfx::cayley_series_backward",
    mutates_args=(),
    schema="(Tensor skew, Tensor grad, int size, int double, bool single) -> Tensor",
)
def cayley_series_backward(skew: Tensor, grad: Tensor, size: int, double: int, single: bool) -> Tensor:
    """The gradient of `cayley_series`: ``(rows, b (b - 1) / 2)`` from ``grad (rows, b, b)``."""
    found = torch.empty_like(skew, memory_format=torch.contiguous_format)
    if skew.numel():
        with on_device_of(skew):
            series_backward_kernel[(skew.shape[0],)](
                skew.contiguous(), grad.contiguous(), found, skew.shape[1], size, double, single, power(size),
                num_warps=WARPS,
            )  # fmt: skip
    return found


@cayley_series.register_fake
def _(skew: Tensor, size: int, double: int, single: bool) -> Tensor:
    return skew.new_empty(skew.shape[0], size, size)


@cayley_series_backward.register_fake
def _(skew: Tensor, grad: Tensor, size: int, double: int, single: bool) -> Tensor:
    return torch.empty_like(skew, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    skew, ctx.size, ctx.double, ctx.single = inputs
    ctx.save_for_backward(skew)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (skew,) = ctx.saved_tensors
    # A gradient that is to be differentiated itself (create_graph) is made of torch's operations.
    of_skew = _differentiable if torch.is_grad_enabled() else cayley_series_backward
    return of_skew(skew, grad, ctx.size, ctx.double, ctx.single), None, None, None


def _differentiable(skew: Tensor, grad: Tensor, size: int, double: int, single: bool) -> Tensor:
    """`cayley_series_backward`, by the same rule."""
    z = skew_matrix(-skew, size)
    eye = torch.eye(size, dtype=z.dtype, device=z.device)
    inner, of_q = (2 * eye + z, grad) if single else ((2 * eye).expand_as(z), torch.zeros_like(grad))
    for _ in range(double):
        of_q = grad @ inner + z @ of_q
        inner = 2 * eye + z @ inner
    return skew_vector(of_q - of_q.mT)


cayley_series.register_autograd(_backward, setup_context=_keep)
