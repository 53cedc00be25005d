"""Rotate what an embedding gives out: ``y = E[ids] @ R``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from oftfx.placement.base import Placement
from oftfx.placement.rows import OPEN, rows_of
from oftfx.rotation.autocast import without_autocast


class RotateOutput(Placement):
    """Forward hook of an embedding: ``y -> y @ R1 @ R2 ...`` for the active adapters, in their order."""

    kind = "activation"

    @property
    def reader(self) -> nn.Module:
        """The layer itself."""
        return self.module

    def register(self) -> None:
        """After the hooks that are there."""
        self.module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """Replace the layer's output."""
        self.note_run()
        rows = rows_of(self) if OPEN.any else None
        if rows is None and not self.in_effect():
            return None
        # What an embedding gives out keeps its dtype under autocast, and so does its product with a rotation.
        with without_autocast(output.device):
            return self.alone(output) if rows is None else rows.rotate(self, output)
