"""Skew-symmetric matrices and the vectors they are stored as."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def skew_size(block_size: int) -> int:
    """Number of free entries of one skew-symmetric block: ``b (b - 1) / 2``."""
    return block_size * (block_size - 1) // 2


@lru_cache(maxsize=64)
def _gather_index(block_size: int, device: torch.device) -> Tensor:
    """Where each entry of Q comes from in ``[skew, -skew, 0]``.

    One gather builds the whole matrix, which is quicker, forward and backward, than filling the upper
    triangle of zeros and subtracting the transpose.
    """
    n = skew_size(block_size)
    index = torch.full((block_size, block_size), 2 * n, dtype=torch.long)
    row, col = torch.triu_indices(block_size, block_size, 1)
    index[row, col] = torch.arange(n)
    index[col, row] = torch.arange(n) + n
    return index.reshape(-1).to(device)


def skew_matrix(skew: Tensor, block_size: int) -> Tensor:
    """Build ``Q = A - A^T`` from the strictly upper triangle.

    Args:
        skew: ``(blocks, b (b - 1) / 2)``, any float dtype; row-major, the order of ``torch.triu_indices(b, b, 1)``.
        block_size: ``b``.

    Returns:
        ``(blocks, b, b)``, dtype of ``skew``, with ``Q^T = -Q``.

    Raises:
        ValueError: the last dimension of ``skew`` is not ``b (b - 1) / 2``.
    """
    if skew.shape[-1] != skew_size(block_size):
        raise ValueError(
            f"a block of size {block_size} has {skew_size(block_size)} skew entries, got {tuple(skew.shape)}"
        )
    index = remembered(_gather_index, block_size, skew.device)
    zero = skew.new_zeros(skew.shape[0], 1)
    return torch.cat([skew, -skew, zero], dim=1).index_select(1, index).unflatten(1, (block_size, block_size))


def remembered(make: Any, what: Any, device: torch.device) -> Tensor:
    """An index of a cached function, on a device: inside a fake, meta or compiled call it would be of that kind too."""
    if device.type == "meta" or torch.compiler.is_compiling():
        found: Tensor = make.__wrapped__(what, device)
        return found
    with torch.inference_mode(False):
        found = make(what, device)
    if type(found) is not Tensor:  # made under FakeTensorMode
        make.cache_clear()
    return found


def skew_vector(matrix: Tensor) -> Tensor:
    """Strictly upper triangle of ``(blocks, b, b)`` as ``(blocks, b (b - 1) / 2)``; inverse of `skew_matrix`."""
    row, col = torch.triu_indices(matrix.shape[-1], matrix.shape[-1], 1, device=matrix.device)
    return matrix[..., row, col]
