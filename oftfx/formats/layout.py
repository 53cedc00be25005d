"""How a stored tensor is read as the matrix whose last axis a rotation turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from oftfx.rotation.autocast import without_autocast
from oftfx.rotation.ieee import ieee_products
from oftfx.rotation.rotate import rotate_weight

Stored = Literal["rows", "columns", "transposed", "experts", "experts_columns", "outputs"]


@dataclass(frozen=True)
class Layout:
    """One way to store a weight; `matrix` and `restore` are inverse, differentiable and exact.

    Attributes:
        stored: shape of the tensor, and of the matrix ``(rows, n)`` it is read as:

            =================== ============================ ============================== ====================
            ``rows``            ``(out, in, *kernel)``       ``(out, in * kernel)``          Linear, Conv, Embedding
            ``columns``         ``(in, out)``                ``(out, in)``                   GPT-2's Conv1D, ``x @ W``
            ``transposed``      ``(in, out/groups, *k)``     ``(groups * ..., in/groups)``   ConvTranspose
            ``experts``         ``(experts, out, in)``       ``(experts * out, in)``         mixtures of experts
            ``experts_columns`` ``(experts, in, out)``       ``(experts * out, in)``         the same for ``x @ W``
            ``outputs``         ``(out, in, *kernel)``       ``(in * kernel, out)``          the other axis of ``rows``
            =================== ============================ ============================== ====================

        groups: of a transposed convolution; the same rotation acts on the input channels of each group.
        each: an own rotation for every expert; the matrix is then ``(out, experts * in)``.
        side: ``"input"``: the layer computes ``x @ M^T`` and x is rotated, so ``M' = M @ R^T``; ``"output"``: a row of
            M is the result (an embedding) and is rotated itself, so ``M' = M @ R``. With ``outputs`` that is
            ``W' = R^T @ W``: the outputs of a layer are rotated, before its bias.

    Examples:
        >>> import torch
        >>> from oftfx.formats import Layout
        >>> layout, stored = Layout("columns"), torch.arange(6.0).view(2, 3)  # (in, out)
        >>> layout.matrix(stored).tolist()
        [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
        >>> torch.equal(layout.restore(layout.matrix(stored), (2, 3)), stored)
        True
    """

    stored: Stored = "rows"
    groups: int = 1
    each: bool = False
    side: Literal["input", "output"] = "input"

    def with_each(self, each: bool) -> Layout:
        """The same layout with one rotation for all experts, or one for every."""
        return replace(self, each=each)

    def matrix(self, tensor: Tensor) -> Tensor:
        """``(rows, n)`` of a stored tensor; a view where that is possible."""
        if self.stored == "rows":
            return tensor.flatten(1)
        if self.stored == "columns":
            return tensor.transpose(0, 1)
        if self.stored == "outputs":
            return tensor.flatten(1).transpose(0, 1)
        if self.stored == "transposed":
            return tensor.flatten(1).unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        rows = tensor if self.stored == "experts" else tensor.transpose(1, 2)  # (experts, out, in)
        return rows.transpose(0, 1).flatten(1) if self.each else rows.flatten(0, 1)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """``(rows, n)`` of the matrix for the shape of a stored tensor."""
        first, *rest = stored
        if self.stored == "rows":
            return first, math.prod(rest)
        if self.stored == "columns":
            return rest[0], first
        if self.stored == "outputs":
            return math.prod(rest), first
        if self.stored == "transposed":
            return self.groups * math.prod(rest), first // self.groups
        out, length = rest if self.stored == "experts" else reversed(rest)
        return (out, first * length) if self.each else (first * out, length)

    def restore(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The stored tensor of ``shape`` for a matrix; inverse of `matrix`."""
        if self.stored == "rows":
            return matrix.reshape(shape)
        if self.stored == "columns":
            return matrix.transpose(0, 1)
        if self.stored == "outputs":
            return matrix.transpose(0, 1).reshape(shape)
        if self.stored == "transposed":
            return matrix.unflatten(0, (self.groups, -1)).transpose(1, 2).reshape(shape)
        experts = shape[0]
        rows = matrix.unflatten(1, (experts, -1)).transpose(0, 1) if self.each else matrix.unflatten(0, (experts, -1))
        return rows if self.stored == "experts" else rows.transpose(1, 2)

    def turned(self, matrix: Tensor, blocks: Tensor) -> Tensor:
        """``M @ R^T`` (input side) or ``M @ R`` (output side) for blocks ``(blocks, b, b)``, in float32 at least."""
        return rotate_weight(matrix, blocks if self.side == "input" else blocks.transpose(1, 2))

    def turned_by(self, matrix: Tensor, chain: Sequence[Tensor]) -> Tensor:
        """The same for several rotations in the order in which they act on activations."""
        for blocks in self.in_order(chain):
            matrix = self.turned(matrix, blocks)
        return matrix

    def turned_now(self, matrix: Tensor, chain: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """`turned_by` without gradients, of a wide matrix, to the bit: written where it belongs, with nothing between.

        Args:
            matrix: ``(rows, n)``, float32 or float64; it is only read.
            chain: blocks ``(blocks, b, b)`` each, one at least, on its device.
            out: where the result goes, contiguous, like the matrix; None: into new memory.
        """
        *others, last = self.in_order(chain)
        for blocks in others:
            matrix = self._turned_into(matrix, blocks, torch.empty_like(matrix, memory_format=torch.contiguous_format))
        out = torch.empty_like(matrix, memory_format=torch.contiguous_format) if out is None else out
        return self._turned_into(matrix, last, out)

    def _turned_into(self, matrix: Tensor, blocks: Tensor, out: Tensor) -> Tensor:
        count, size, _ = blocks.shape
        blocks = blocks.to(matrix.dtype)
        given, made = (t.view(-1, count, size).transpose(0, 1) for t in (matrix.contiguous(), out))
        with without_autocast(matrix.device), ieee_products():
            torch.bmm(given, blocks.transpose(1, 2) if self.side == "input" else blocks, out=made)
        return out

    def in_order(self, chain: Sequence[Tensor]) -> Sequence[Tensor]:
        """Rotations in the order in which they turn a matrix: ``x R1 R2 W^T = x (W R2^T R1^T)^T``."""
        return chain if self.side == "output" else chain[::-1]
