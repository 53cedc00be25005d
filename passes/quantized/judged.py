"""What is rounded, and how its outputs do on inputs that were held out."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Protocol

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.folding.shown import Shown
from oftfx.formats.base import WeightFormat, WeightState


class Rounding(Protocol):
    """What is rounded: a `oftfx.folding.turned.Turned` is, and so is one expert of many."""

    @property
    def module(self) -> nn.Module:
        """What stores it."""

    @property
    def format(self) -> WeightFormat:
        """How."""

    @property
    def base(self) -> Tensor:
        """The weight as it is, ``(out, in)``."""

    @property
    def target(self) -> Tensor:
        """What it should be."""


@dataclass(frozen=True)
class Judged:
    """Outputs on held-out inputs: ``Y = X W^T`` before, ``Y' = X W'^T`` wanted, ``Y_folded = X~ W_folded^T``.

    Attributes:
        lost: ``|Y_folded - Y'|^2``.
        whole: ``|Y'|^2``.
        arrived: ``<Y_folded - Y, Y' - Y>``.
        asked: ``|Y' - Y|^2``.
    """

    lost: float = 0.0
    whole: float = 0.0
    arrived: float = 0.0
    asked: float = 0.0

    @classmethod
    def of(cls, site: Rounding, state: WeightState, judge: Shown) -> Judged:
        """Of a weight, by these inputs."""
        wanted, before = judge.outputs(site.target), judge.outputs(site.base)
        folded = judge.outputs(values_of(site, state), own=True)
        whole, lost = wanted.square().sum(), (folded - wanted).square_().sum()
        update = wanted.sub_(before)
        arrived = folded.sub_(before).mul_(update).sum()
        return cls(float(lost), float(whole), float(arrived), float(update.square_().sum()))

    def __add__(self, other: Judged) -> Judged:
        sums = zip(astuple(self), astuple(other), strict=True)
        return Judged(*(a + b for a, b in sums))

    @property
    def error(self) -> float:
        """``|Y_folded - Y'| / |Y'|``."""
        return (self.lost / self.whole) ** 0.5 if self.whole > 0 else 0.0

    @property
    def survival(self) -> float:
        """``<Y_folded - Y, Y' - Y> / |Y' - Y|^2``."""
        return self.arrived / self.asked if self.asked > 0 else 1.0


@torch.no_grad()
def values_of(site: Rounding, state: WeightState) -> Tensor:
    """The weight ``(out, in)`` that a state stands for; the layer has its own again afterwards."""
    module, weight_format = site.module, site.format
    old = weight_format.read(module)
    weight_format.write(module, state)
    try:
        return weight_format.dequantize(module)
    finally:
        weight_format.write(module, old)
