"""What a recorded program says of a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oftfx.trace.torch_private import device_of


@dataclass(frozen=True)
class Value:
    """A tensor without its memory, ``node.meta["value"]`` of a recorded node; a fake tensor would keep its mode alive.

    Attributes:
        shape: sizes; symbolic ones where they are free.
        dtype: of the numbers.
        device: where they were.
        requires_grad: whether gradients flow to it.
        is_leaf: whether it is no result of autograd.
    """

    shape: tuple[int | torch.SymInt, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    is_leaf: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Value:
        """What there is to say of a tensor."""
        try:
            is_leaf = tensor.is_leaf
        except RuntimeError:  # a view without gradients of what was written to since: autograd does not say
            is_leaf = False
        return cls(tuple(tensor.shape), tensor.dtype, device_of(tensor), tensor.requires_grad, is_leaf)
