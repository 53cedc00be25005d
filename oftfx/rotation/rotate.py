"""Apply block-diagonal rotations to activations and to weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from oftfx.rotation.autocast import without_autocast
from oftfx.rotation.ieee import ieee_products
from oftfx.rotation.lean import without_input
from oftfx.rotation.triton import choose


def rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """Rotate the last axis of an activation: ``y = x @ blockdiag(R)``.

    Transpose, batched product, transpose: the fastest of the six formulations measured, in torch and in
    ONNX Runtime, and it never builds the dense ``(n, n)`` matrix.

    Args:
        x: ``(..., n)`` with ``n = blocks * b``, any float dtype, any number of leading axes, also none.
        blocks: ``(blocks, b, b)``.

    Returns:
        ``(..., n)``; shape and dtype of ``x``. The product runs in the dtype of ``x``.
    """
    if has_torch_function_variadic(x, blocks):
        return handle_torch_function(rotate, (x, blocks), x, blocks)
    if x.is_nested:  # the encoder of torch.nn packs padded batches so; such tensors cannot be split into blocks
        return F.linear(x, torch.block_diag(*blocks.to(x.dtype)).T)
    count, size, _ = blocks.shape
    if not torch.compiler.is_compiling() and x.numel() == count * size:  # one token: nothing to transpose
        return torch.bmm(x.reshape(count, 1, size), _as(x, blocks)).reshape(x.shape)
    if torch.is_grad_enabled() and (ys := without_input(x, blocks, _in_torch)) is not None:
        return ys[0]
    if choose.possible(x) and choose.rotates(x, blocks, _in_torch):
        from oftfx.rotation.triton.rotate import rotate as by_triton

        return by_triton(x, blocks)
    return _in_torch(x, blocks)


def _in_torch(x: Tensor, blocks: Tensor) -> Tensor:
    count, size, _ = blocks.shape
    split = x.reshape(-1, count, size).transpose(0, 1)
    turned = torch.bmm(split, _as(x, blocks))
    return turned.transpose(0, 1).reshape(x.shape)


def _as(x: Tensor, blocks: Tensor) -> Tensor:
    return blocks if blocks.dtype == x.dtype else blocks.to(x.dtype)


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """``y`` in the memory format of ``x``, of the same shape.

    In another format a layer may take a kernel that sums in another order, and the identity would not be exact.
    """
    return y if x.is_contiguous() or x.stride() == y.stride() else torch.empty_like(x).copy_(y)


def rotate_jointly(x: Tensor, blocks: Tensor) -> tuple[Tensor, ...]:
    """Rotate the last axis by several rotations in one batched product: ``y_i = x @ blockdiag(R_i)``.

    Args:
        x: ``(..., n)`` with ``n = blocks * b``.
        blocks: ``(blocks, b, count * b)``, the blocks of the rotations side by side, in the dtype of ``x``.

    Returns:
        ``count`` tensors ``(..., n)``.
    """
    if has_torch_function_variadic(x, blocks):
        return handle_torch_function(rotate_jointly, (x, blocks), x, blocks)
    if torch.is_grad_enabled() and (ys := without_input(x, blocks, _jointly_in_torch)) is not None:
        return ys
    if choose.possible(x) and choose.rotates(x, blocks, _jointly_in_torch):
        from oftfx.rotation.triton.rotate import rotate_jointly as by_triton

        return by_triton(x, blocks)
    return _jointly_in_torch(x, blocks)


def _jointly_in_torch(x: Tensor, blocks: Tensor) -> tuple[Tensor, ...]:
    count, size, width = blocks.shape
    turned = torch.bmm(x.reshape(-1, count, size).transpose(0, 1), _as(x, blocks))
    if torch.is_grad_enabled() and turned.requires_grad:  # the quicker one of two, forward and backward together
        return tuple(part.transpose(0, 1).reshape(x.shape) for part in turned.split(size, dim=2))
    ordered = turned.unflatten(2, (width // size, size)).permute(2, 1, 0, 3)
    return ordered.reshape(width // size, *x.shape).unbind(0)


def rotate_apart(x: Tensor, blocks: Tensor) -> list[Tensor]:
    """`rotate_jointly` without a gradient, into contiguous tensors that share no memory."""
    if choose.possible(x) and choose.rotates(x, blocks, _jointly_in_torch):
        from oftfx.rotation.triton.rotate import rotate_jointly as by_triton

        return list(by_triton(x, blocks))
    count, size, _ = blocks.shape
    turned = torch.bmm(x.reshape(-1, count, size).transpose(0, 1), _as(x, blocks))
    return [_copied(part.transpose(0, 1), x) for part in turned.split(size, dim=2)]


def _copied(part: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(part.shape).copy_(part).view(x.shape)


def rotate_weight(weight: Tensor, blocks: Tensor) -> Tensor:
    """Fold a rotation of the input into a weight: ``W' = W @ blockdiag(R)^T``.

    ``rotate(x, R) @ W^T == x @ W'^T``. Blockwise: ``out * n * b`` products instead of ``out * n * n``.

    Args:
        weight: ``(out, n)``, any float dtype.
        blocks: ``(blocks, b, b)`` with ``blocks * b = n``.

    Returns:
        ``(out, n)`` in float32, or float64 if ``weight`` is float64; the caller rounds, once.

    Source: OFTv2 eq. 2, arXiv 2506.19847.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    with without_autocast(weight.device), ieee_products():
        # The product of a fold never hangs on a timing. A recorder sees a rotation, as ever.
        product = rotate if has_torch_function_variadic(weight, blocks) else _in_torch
        return product(weight.to(wide), blocks.to(wide).transpose(1, 2))
