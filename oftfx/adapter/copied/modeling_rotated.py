"""A model of transformers with rotations in front of its linear layers: the code of a checkpoint that oftfx wrote.

It needs torch and transformers alone. ``config.rotations`` gives for the path of each such layer the shapes
``[[count, size], ...]`` of the blocks that turn its input, one after another: ``y = layer(x @ blockdiag(turn_0) ...)``.
The layer itself is called ``layer`` there, and is whatever its reader makes of a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import transformers
from torch import Tensor


class Rotated(nn.Module):
    """A layer with rotations in front of it.

    Args:
        layer: takes ``(..., n)``.
        shapes: of the blocks, ``count * size == n`` each.
    """

    def __init__(self, layer: nn.Module, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.layer = layer
        self.names = tuple(f"turn_{place}" for place in range(len(shapes)))
        for name, (count, size) in zip(self.names, shapes, strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(count, size, size), requires_grad=False))

    def forward(self, x: Tensor) -> Any:
        """Rotate ``x (..., n)``, then the layer."""
        for name in self.names:
            blocks = getattr(self, name)
            count, size = blocks.shape[:2]
            if x.shape[-1] != count * size:
                raise ValueError(f"{count * size} inputs are rotated, not {x.shape[-1]}: no tensor parallelism here")
            parts = x.reshape(-1, count, size).transpose(0, 1)
            x = torch.bmm(parts, blocks.to(x.dtype)).transpose(0, 1).reshape(x.shape)
        return self.layer(x)


def rotating(name: str) -> type[Any]:
    """The class of transformers of this name, with the rotations that its configuration names."""
    base = getattr(transformers, name)

    # Without annotations: vLLM 0.32 takes them for types and compares arguments with them, and here they are texts.
    def __init__(self, config, *args, **kwargs):  # type: ignore[no-untyped-def]  # noqa: N807
        base.__init__(self, config, *args, **kwargs)
        for path, shapes in config.rotations.items():
            # A model without its head has the layers at shorter paths.
            inside = path if hasattr(self, path.partition(".")[0]) else path.partition(".")[2]
            parent, _, own = inside.rpartition(".")
            setattr(self.get_submodule(parent), own, Rotated(self.get_submodule(inside), shapes))

    return type(f"Rotated{name}", (base,), {"__init__": __init__, "__module__": __name__})
