"""Second moments of what a layer reads, and errors of its output measured by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Moments:
    """``X^T X`` of the inputs of one layer after the other; layers that read the same tensors share it.

    Memory is that of one layer, ``(in, in)`` in float32.
    """

    def __init__(self) -> None:
        self._inputs: tuple[Tensor, ...] = ()
        self._versions: tuple[int | None, ...] = ()
        self._value: Tensor | None = None

    def of(self, inputs: Sequence[Tensor]) -> Tensor:
        """``(in, in)`` of tensors ``(..., in)``."""
        versions = tuple(_version(x) for x in inputs)
        same = len(inputs) == len(self._inputs) and all(a is b for a, b in zip(inputs, self._inputs, strict=True))
        if not same or None in versions or versions != self._versions or self._value is None:
            self._inputs, self._versions, self._value = tuple(inputs), versions, second_moments(inputs)
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


def output_arrived(base: Tensor, target: Tensor, folded: Tensor, moments: Tensor) -> tuple[float, float]:
    """Relative error of the layer's output, bias aside, and survival of the update there.

    ``|X (folded - target)^T| / |X target^T|``, and
    ``<X (folded - base)^T, U> / |U|^2`` with ``U = X (target - base)^T``.

    Args:
        base: the weight before, ``(out, in)`` like the others.
        target: what it should become.
        folded: what it became.
        moments: ``X^T X``.
    """
    missed, whole = _product(folded - target, folded - target, moments), _product(target, target, moments)
    update = target - base
    asked = _product(update, update, moments)
    error = (missed / whole) ** 0.5 if whole > 0 and missed > 0 else 0.0
    return error, _product(folded - base, update, moments) / asked if asked > 0 else 1.0


def _product(a: Tensor, b: Tensor, moments: Tensor) -> float:
    """``<X a^T, X b^T>``."""
    return float(torch.sum((a.float() @ moments.to(a.device)) * b.float()))
