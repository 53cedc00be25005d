"""What stands where in a model: one walk, handed on from step to step."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn as nn

from oftfx.formats.base import WeightFormat
from oftfx.formats.registry import format_of


class ModelIndex:
    """Paths, parameters and weight formats of a model, each looked up once, when it is first needed.

    It stands for the model as it was when that was looked up: what adds, removes or replaces modules or parameters
    makes a new one. Our own modules (rotations) are in it like all others.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._formats: dict[nn.Module, WeightFormat | None] = {}

    @classmethod
    def of(cls, model: nn.Module | ModelIndex) -> ModelIndex:
        """The index itself, or a new one of a model."""
        return model if isinstance(model, ModelIndex) else cls(model)

    @cached_property
    def paths(self) -> dict[nn.Module, list[str]]:
        """All paths of each module, in the order of ``named_modules``."""
        found: dict[nn.Module, list[str]] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            found.setdefault(module, []).append(path)
        return found

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Each module by its first path."""
        return {paths[0]: module for module, paths in self.paths.items()}

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Each parameter by each of its names."""
        return self._tensors("_parameters")

    @cached_property
    def buffers(self) -> dict[str, torch.Tensor]:
        """Each buffer by each of its names, also those that no ``state_dict`` holds."""
        return self._tensors("_buffers")

    def _tensors(self, kind: str) -> dict[str, Any]:
        walked = self.model.named_modules(remove_duplicate=False)
        return {
            f"{path}.{name}" if path else name: tensor
            for path, module in walked
            for name, tensor in vars(module)[kind].items()
            if tensor is not None
        }

    @cached_property
    def names(self) -> dict[int, list[str]]:
        """All names of each parameter, by its ``id``."""
        found: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            found.setdefault(id(parameter), []).append(name)
        return found

    def clear(self) -> None:
        """Let go of every module and parameter; what is asked for afterwards is looked up anew."""
        self._formats.clear()
        for name in ("paths", "modules", "parameters", "buffers", "names"):
            self.__dict__.pop(name, None)

    def path(self, module: nn.Module) -> str:
        """The first path of a module."""
        return self.paths[module][0]

    def format_of(self, module: nn.Module) -> WeightFormat | None:
        """See `oftfx.formats.format_of`."""
        if module not in self._formats:
            self._formats[module] = format_of(module)
        return self._formats[module]
