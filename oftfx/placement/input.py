"""Rotate what a layer reads: ``y = layer(x @ R)``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn

from oftfx.model.running import input_name
from oftfx.placement.base import Placement
from oftfx.placement.group import InputGroup
from oftfx.placement.rows import OPEN, rows_of
from oftfx.rotation.accelerate import HOOK
from oftfx.rotation.frozen import FrozenRotation
from oftfx.rotation.module import Rotation
from oftfx.rotation.rotate import in_format_of


class RotateInput(Placement):
    """Forward pre-hook of a layer: ``x -> x @ R1 @ R2 ...`` for the active adapters, in their order.

    Attributes:
        axis: the rotated axis of the input, counted from the end; -1, or the channels of a 1x1 convolution.
        groups: of the convolution; the same rotation acts on the channels of each group.
        group: the sites that read the same tensor, or None.
    """

    kind = "activation"

    def __init__(self, *args: Any, axis: int = -1, groups: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.axis, self.groups = axis, groups
        self.group: InputGroup | None = None

    @property
    def reader(self) -> nn.Module:
        """The layer itself."""
        return self.module

    def register(self) -> None:
        """After the pre-hooks that are there."""
        self.module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Replace the layer's input, given by position or by name."""
        self.note_run()
        if kwargs is None or not (self.active or self.fixed or OPEN.any):
            return None  # without keywords: taken away by a hook that ran before this one, in the same call
        if self.through and self.fold_in_effect() is not None:
            return None  # the weight that the layer multiplies by is rotated
        name = None if args else input_name(module, kwargs)
        x = args[0] if name is None else kwargs[name]
        if HOOK in module.__dict__:  # accelerate moves inputs later, in the forward
            x = self._moved(x)
        y = self.rotate(x)
        return ((y, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: y})

    def _moved(self, x: torch.Tensor) -> torch.Tensor:
        """To where the rotations are."""
        here: list[Rotation | FrozenRotation] = [*self.fixed, *self.rotations.values()]
        device = here[0].device if here else x.device
        return x if x.device == device or device.type == "meta" else x.to(device)

    def join(self, group: InputGroup) -> None:
        """Rotate together with the sites of a group."""
        self.group = group
        group.add(self)

    def forget(self) -> None:
        """Drop what the group keeps."""
        if self.group is not None:
            self.group.forget()

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Apply what acts to the input, any number of other axes; together with the sites that read the same."""
        if OPEN.any and (rows := rows_of(self)) is not None:
            y = rows.rotate(self, x, self.axis)
        else:
            y = self.alone(x) if self.group is None else self.group.rotate(self, x)
        return y if x.is_nested else in_format_of(x, y)

    def alone(self, x: torch.Tensor, names: Iterable[str] | None = None) -> torch.Tensor:
        """The same for this site only, on the axis that it turns."""
        if self.axis == -1:
            return super().alone(x, names)
        y = super().alone(x.movedim(self.axis, -1).unflatten(-1, (self.groups, -1)), names)
        y = y.flatten(-2).movedim(-1, self.axis)
        return y.contiguous() if x.is_contiguous() else y
