"""How far results may be apart."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Largest relative error of a whole model, by what a pass promises and the dtype of the output.
# Measured on SmolLM2 after folding 210 sites: float32 2e-6, bfloat16 5e-3.
BOUNDS: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 1e-2,
}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``|got - expected| / |expected|``, Frobenius, in float64."""
    missed, whole = squared_error(got, expected)
    return math.sqrt(missed / whole) if whole > 0 else math.sqrt(missed)


def squared_error(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """``|got - expected|^2`` and ``|expected|^2`` in float64; of tensors of any size, without copies of them."""
    sums = [
        torch.stack([(a.double() - b.double()).square_().sum(), b.double().square().sum()])
        for a, b in pieces(got.detach(), expected.detach())
    ]
    missed, whole = torch.stack(sums).sum(0).tolist()
    return missed, whole


def piece_on(device: torch.device) -> int:
    """How many elements to treat at a time: on a CPU what stays in its cache, elsewhere what is worth a launch."""
    return 2**18 if device.type == "cpu" else 2**24


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of tensors of one shape, some at a time, so that what is computed from them is small."""
    first = tensors[0]
    if first.dim() == 0:
        yield tensors
        return
    width = first.shape[-1] if first.dim() > 1 else 1
    rows = max(1, piece_on(first.device) // max(1, width))
    yield from zip(*(t.flatten(0, -2).split(rows) if t.dim() > 2 else t.split(rows) for t in tensors), strict=True)
