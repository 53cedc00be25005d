"""Second moments of what a layer reads."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor


class Moments:
    """``X^T X`` of the inputs of one layer after the other; layers that read the same tensors share it.

    Memory is that of one layer, ``(in, in)`` in float32; inputs are not kept alive.
    """

    def __init__(self) -> None:
        self._inputs: tuple[weakref.ref[Tensor], ...] = ()
        self._versions: tuple[int | None, ...] = ()
        self._value: Tensor | None = None

    def of(self, inputs: Sequence[Tensor]) -> Tensor:
        """``(in, in)`` of tensors ``(..., in)``."""
        versions = tuple(_version(x) for x in inputs)
        same = len(inputs) == len(self._inputs) and all(a is b() for a, b in zip(inputs, self._inputs, strict=True))
        if not same or None in versions or versions != self._versions or self._value is None:
            self._value = None  # before the next one is made
            self._inputs, self._versions = tuple(weakref.ref(x) for x in inputs), versions
            self._value = second_moments(inputs)
        return self._value


def _version(x: Tensor) -> int | None:
    """Counts what was written in place; None where that is not known."""
    return None if x.is_inference() else x._version


@torch.no_grad()
def second_moments(inputs: Sequence[Tensor]) -> Tensor:
    """``sum X^T X`` of tensors ``(..., in)``, float32."""
    size = inputs[0].shape[-1]
    total = torch.zeros(size, size, device=inputs[0].device)
    for x in inputs:
        rows = x.detach().reshape(-1, size).float()
        total.addmm_(rows.T, rows)
    return total
