"""What of a wanted update a weight got, and what its outputs did."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arrived:
    """See `SiteFold`, whose fields these become; the last two are known where the layer's inputs are.

    Attributes:
        error: ``|folded - target| / |target|``.
        survival: ``<folded - base, target - base> / |target - base|^2``.
        output_error: the same of ``X folded^T``.
        output_survival: the same of ``X folded^T``.
    """

    error: float = 0.0
    survival: float = 1.0
    output_error: float | None = None
    output_survival: float | None = None


def arrived(parts: Iterable[tuple[Tensor, Tensor, Tensor]], moments: Tensor | None) -> Arrived:
    """Compare a weight, part by part: memory is that of a few parts.

    Args:
        parts: rows of the weight that was written, of what was wanted, and of what it was.
        moments: ``X^T X`` of the layer's inputs.
    """
    weights, outputs = list[Tensor](), list[Tensor]()
    for folded, target, base in parts:
        each = folded - target, target, target - base, folded - base
        weights.append(_products(each, each))
        if moments is not None:
            each = tuple(t.to(moments) for t in each)
            outputs.append(_products(each, tuple(t @ moments for t in each[:3])))
    return Arrived(*_ratios(weights), *(_ratios(outputs) if outputs else ()))


def _products(of: tuple[Tensor, ...], by: tuple[Tensor, ...]) -> Tensor:
    """``|error|^2, |target|^2, |update|^2`` and ``<update, arrived>``."""
    (error, target, update, moved), (error_by, target_by, update_by, *_) = of, by
    pairs = (error, error_by), (target, target_by), (update, update_by), (moved, update_by)
    return torch.stack([torch.sum(a * b) for a, b in pairs]).double()


def _ratios(products: list[Tensor]) -> tuple[float, float]:
    missed, whole, asked, kept = torch.stack(products).sum(0).tolist()
    missed = max(missed, 0.0)  # by rounding it may be less
    error = math.sqrt(missed / whole) if whole > 0 else math.sqrt(missed)
    return error, kept / asked if asked > 0 else 1.0
