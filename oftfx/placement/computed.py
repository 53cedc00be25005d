"""Rotate a weight that a parametrization computes, where it is computed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from oftfx.errors import OftfxError
from oftfx.formats.parametrized import parametrization_of
from oftfx.placement.base import Placement
from oftfx.placement.rows import OPEN, rows_of
from oftfx.placement.rows_of_weight import chain_of_call
from oftfx.rotation.remade import remade


class RotateComputed(Placement):
    """The last step of a parametrization: ``W -> W @ R2^T @ R1^T`` for whoever reads the parameter.

    For 4-bit experts, whose parameter is dequantized when it is read. The rotated weight is made anew in every forward,
    as the dequantized one is. The step is a module without parameters; it is in no ``state_dict``.
    """

    kind = "weight"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        weight_format = self.weight_format()
        if weight_format is None:
            raise OftfxError(f"{self.site}: no known format reads the weight of this {type(self.module).__name__}")
        self.layout = weight_format.layout(self.module)

    @property
    def reader(self) -> nn.Module:
        """The module that holds the weight."""
        return self.module

    def register(self) -> None:
        """As the last step; the hook only shows that the module is called, and whose placement this is."""
        computes = parametrization_of(self.module, self.parameter)
        if computes is None:
            raise OftfxError(
                f"{self.site}: nothing computes this parameter of the {type(self.module).__name__} any more"
            )
        if not any(_is_of(step, self) for step in computes):
            computes.append(_Step(self).train(self.module.training))
        self.module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Remember the call."""
        self.note_run()

    def turned(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as the reader sees it, in its own shape and dtype."""
        rows = rows_of(self) if OPEN.any else None
        chain = self.in_effect(None if rows is None else chain_of_call(rows, self))
        if not chain:
            return weight
        return remade(self._turned, weight, *(r.effective() for r in chain))

    def _turned(self, weight: torch.Tensor, *blocks: torch.Tensor) -> torch.Tensor:
        matrix = self.layout.turned_by(self.layout.matrix(weight), list(blocks))
        return self.layout.restore(matrix, tuple(weight.shape)).to(weight.dtype).contiguous()

    def remove(self) -> None:
        """Take the step away as well."""
        super().remove()
        computes = parametrization_of(self.module, self.parameter)
        if computes is None:
            return
        kept = [step for step in computes if not _is_of(step, self)]
        computes._modules.clear()
        computes._modules.update((str(i), step) for i, step in enumerate(kept))


class _Step(nn.Module):
    def __init__(self, placement: RotateComputed) -> None:
        super().__init__()
        self.__dict__["_placement"] = placement

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self._placement.turned(weight)


def _is_of(step: nn.Module, placement: RotateComputed) -> bool:
    return isinstance(step, _Step) and step._placement is placement
