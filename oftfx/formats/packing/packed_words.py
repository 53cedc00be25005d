"""What GPTQ and AWQ layers have in common: words, zeros and scales in buffers, and gptqmodel's CPU kernels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.formats.base import WeightState
from oftfx.formats.packing import gptqmodel_cpu as cpu
from oftfx.formats.packing.zero_points import Stored
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes

_REPLACED = ("qweight", "qzeros", "scales")


class PackedWords(ScalarFormat):
    """Packed integers less a zero point, times a scale, by groups of columns.

    Attributes:
        counted: buffers that `nbytes` counts.
    """

    counted: ClassVar[tuple[str, ...]] = _REPLACED

    @abstractmethod
    def bits(self, module: nn.Module) -> int:
        """Of a code."""

    @abstractmethod
    def words(self, stored: Stored, like: nn.Module) -> dict[str, Any]:
        """What ``like`` would hold, packed as in a file, for an unpacked weight."""

    def dtype(self, module: nn.Module) -> torch.dtype:
        """Of the scales."""
        return cpu.scale_dtype(module)

    def pack(self, coded: Codes, like: nn.Module) -> WeightState:
        """In the packing of a file; which column is in which group stays."""
        return self.words(Stored.of(coded, self.bits(like), self.dtype(like)), like)

    def read(self, module: nn.Module) -> WeightState:
        """Words and scales, and what says how a CPU kernel has packed them."""
        return {n: getattr(module, n) for n in _REPLACED} | cpu.marks(module)

    def write(self, module: nn.Module, state: WeightState) -> None:
        """Replace all of it."""
        marks = dict(state)
        for name in _REPLACED:
            module._buffers[name] = marks.pop(name)
        cpu.set_marks(module, marks)

    def nbytes(self, module: nn.Module) -> int:
        """Of the buffers that hold the weight."""
        tensors: list[Tensor] = [getattr(module, n) for n in self.counted]
        return sum(t.numel() * t.element_size() for t in tensors)

    def hold_still(self, module: nn.Module) -> Callable[[], None]:
        """Forbid the CPU kernels' repacking."""
        return cpu.hold_still(module)

    def prepare(self, module: nn.Module) -> str | None:
        """Forbid the CPU kernels' repacking, undo one that has happened, let ``train()`` work."""
        return cpu.settle(module, self.words)
