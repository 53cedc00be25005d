"""One result for several readers of the same tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class HandOut:
    """Keeps a rotated tensor only until each member of a group has taken it.

    Nothing outlives the forward, and a recomputation (gradient checkpointing) starts afresh: a member that asks twice
    gets a new result. The source tensor is known by identity and version, through a weak reference.

    Args:
        members: paths of the sites that read the same tensor.
    """

    def __init__(self, members: tuple[str, ...]) -> None:
        self.members = members
        self.forget()

    def forget(self) -> None:
        """Drop what waits."""
        self._pending: tuple[Any, Any, Tensor, frozenset[str]] | None = None

    def take(self, x: Tensor, state: Any, member: str, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """``compute(x)``, or the result that another member has just got for the same ``x`` and ``state``.

        Args:
            x: the tensor to rotate.
            state: whatever else the result depends on; compared with ``==``.
            member: who asks.
            compute: how to make the result.
        """
        if torch.compiler.is_compiling() or x.is_inference():
            return compute(x)
        key = (x._version, torch.is_grad_enabled(), _autocast(x), state)
        pending = self._pending  # read once: another thread may replace it
        if pending is not None:
            source, known, result, waiting = pending
            if source() is x and known == key and member in waiting:
                left = waiting - {member}
                self._pending = (source, known, result, left) if left else None
                return result
        result = compute(x)
        # A member that is never called must not keep the result: it goes with x, or when its graph is used up.
        self._pending = (weakref.ref(x, self._drop), key, result, frozenset(self.members) - {member})
        if result.requires_grad:
            result.register_hook(self._drop)
        return result

    def _drop(self, _: object) -> None:
        self._pending = None

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "_pending": None}


def _autocast(x: Tensor) -> tuple[bool, torch.dtype | None]:
    on = torch.is_autocast_enabled(x.device.type)
    return on, torch.get_autocast_dtype(x.device.type) if on else None
