"""Second moments of what a layer multiplies its weight by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from oftfx.errors import FoldError
from oftfx.model.site import Site


@dataclass(frozen=True, eq=False)
class Seen:
    """What a layer reads on the calibration inputs.

    Attributes:
        moments: ``X^T X (in, in)`` float64; of an embedding its diagonal ``(in,)``: how often each row was looked up.
        tokens: rows of X.
    """

    moments: Tensor
    tokens: int


@torch.no_grad()
def see(site: Site, module: nn.Module, inputs: Sequence[Tensor]) -> Seen | None:
    """The moments of one layer; None where nothing but zeros was read.

    Args:
        site: it.
        module: the layer.
        inputs: what it was called with, before its rotation.

    Raises:
        FoldError: an input is not finite.
    """
    if site.kind == "embedding":
        counts = sum(torch.bincount(x.reshape(-1), minlength=site.out_features) for x in inputs)
        assert isinstance(counts, Tensor)
        return Seen(counts.double(), int(counts.sum())) if bool(counts.any()) else None
    total = torch.zeros(site.in_features, site.in_features, dtype=torch.float64, device=inputs[0].device)
    tokens = 0
    for x in inputs:
        rows = (_patches(module, x) if site.kind.startswith("conv") and site.kind != "conv1d_gpt2" else x).detach()
        rows = rows.reshape(-1, site.in_features)
        tokens += len(rows)
        for part in rows.split(2**14):
            wide = part.double()
            total.addmm_(wide.T, wide)
    if not bool(torch.isfinite(total).all()):
        raise FoldError(f"{site.fqn}: what it reads on the calibration inputs is not finite")
    return Seen(total, tokens) if bool(total.any()) else None


def _patches(module: nn.Module, x: Tensor) -> Tensor:
    """``(..., in * kernel)``: what each output of a convolution without dilation is the product of."""
    layer: Any = module
    kernel, axes = layer.kernel_size, len(layer.kernel_size)
    if x.dim() == axes + 1:
        x = x.unsqueeze(0)
    if layer.padding == "same":
        sides = [((k - 1) // 2, k - 1 - (k - 1) // 2) for k in kernel]
    else:
        sides = [(0, 0) if layer.padding == "valid" else (p, p) for p in _each(layer.padding, axes)]
    x = F.pad(x, [p for pair in reversed(sides) for p in pair])
    for axis, (k, step) in enumerate(zip(kernel, layer.stride, strict=True)):
        x = x.unfold(2 + axis, k, step)  # (N, C, *places, *kernel)
    return x.movedim(1, 1 + axes).flatten(1 + axes)


def _each(value: Any, axes: int) -> Sequence[int]:
    return value if isinstance(value, tuple) else (0,) * axes
