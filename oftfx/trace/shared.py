"""What a recording's copy shares with the model, and must not write into."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn as nn

from oftfx.trace.torch_private import is_fake, without_modes

_WRITING = {"__setitem__"} | {
    f"__i{n}__" for n in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}
_NOT_WRITING = {"requires_grad_", "detach_", "share_memory_", "rename_"}


def writes(name: str) -> bool:
    """Whether a torch function of that name writes into its first argument."""
    return name in _WRITING or (name.endswith("_") and not name.endswith("__") and name not in _NOT_WRITING)


class Shared:
    """The memory of a model's parameters, and of those of its buffers that the copy has as well.

    Args:
        copy: what is recorded.
        model: what it is a copy of.
    """

    def __init__(self, copy: nn.Module, model: nn.Module) -> None:
        self._copy, self._model = copy, model

    def written(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """What a torch function of that name would write into, if that is shared; fake tensors have no memory."""
        if writes(name):
            target = args[0]
        elif name in ("embedding", "embedding_bag") and kwargs.get("max_norm") is not None and not is_fake(args[0]):
            # Rows are scaled first; those that fake numbers choose are fake.
            target = args[1] if len(args) > 1 else kwargs.get("weight")
        else:
            return None
        real = isinstance(target, torch.Tensor) and not is_fake(target)
        return target if real and _address(target) in self._addresses else None

    @cached_property
    def _addresses(self) -> set[int]:
        tensors = [*self._copy.parameters(), *self._model.buffers()]
        return {place for t in tensors if (place := _address(t))}


def _address(tensor: torch.Tensor) -> int:
    """Where a tensor's memory is; 0 where it has none."""
    with without_modes():
        try:
            return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
        except (NotImplementedError, RuntimeError):  # a subclass that is several tensors
            return 0
