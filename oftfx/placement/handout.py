"""Results for several readers of the same tensor, made at once and handed to each."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class HandOut:
    """Keeps what was made of a tensor only until each member of a group has taken its part.

    Nothing outlives the forward, and a recomputation (gradient checkpointing) starts afresh: a member that asks twice
    gets a new result. The source tensor is known by identity and version, through a weak reference.

    Under ``torch.compile`` and ``torch.export`` the results are kept as an attribute of the traced tensor, which only
    exists while tracing. Dynamo forbids that for a tensor that comes from outside a checkpointed region, so it is done
    for ``local`` tensors only: those that the layer around the group makes itself.

    Args:
        key: name of the group, for that attribute.
        local: see above.
    """

    def __init__(self, key: str, *, local: bool = False) -> None:
        # Two keys never become one name, as those of a.b_c and a_b.c would if a dot were just an underscore.
        self.attribute, self.local = "_oftfx_" + key.replace("_", "_u").replace(".", "_d"), local
        self.forget()

    def forget(self) -> None:
        """Drop what waits."""
        self._pending: tuple[Any, Any, Mapping[str, Tensor]] | None = None

    def take(
        self,
        x: Tensor,
        state: Callable[[], Any],
        member: str,
        everything: Callable[[], Mapping[str, Tensor]],
        alone: Callable[[], Tensor],
    ) -> Tensor:
        """The member's part of ``everything()``; made now, or by another member for the same ``x`` and ``state``.

        Args:
            x: the tensor that is rotated.
            state: gives whatever else the results depend on; compared with ``==``.
            member: who asks.
            everything: makes the results of all members.
            alone: makes this member's only, where nothing can be handed out.
        """
        if torch.compiler.is_compiling():
            return self._take_traced(x, member, everything, alone)
        if x.is_inference():
            return alone()
        key = (x._version, torch.is_grad_enabled(), _autocast(x), _checkpoint(), state())
        pending = self._pending  # read once: another thread may replace it
        if pending is not None:
            source, known, waiting = pending
            if source() is x and known == key and member in waiting:
                left = {m: t for m, t in waiting.items() if m != member}
                self._pending = (source, known, left) if left else None
                return waiting[member]
        results = everything()
        left = {m: t for m, t in results.items() if m != member}
        # A member that is never called must not keep its result: it goes with x, or when its graph is used up.
        self._pending = (weakref.ref(x, self._drop), key, left) if left else None
        for result in {id(t): t for t in results.values()}.values():
            if result.requires_grad:
                result.register_hook(self._drop)
        return results[member]

    def _take_traced(
        self, x: Tensor, member: str, everything: Callable[[], Mapping[str, Tensor]], alone: Callable[[], Tensor]
    ) -> Tensor:
        if torch.compiler.is_dynamo_compiling() and not self.local:
            return alone()
        results = getattr(x, self.attribute, None)
        if results is None:
            results = everything()
            setattr(x, self.attribute, results)
        return results[member]

    def _drop(self, _: object) -> None:
        self._pending = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": None}


def _checkpoint() -> Any:
    """What tells one checkpointed region from another: each recomputes what it computed, so nothing crosses borders."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks(True) if hooks is not None else None


def _autocast(x: Tensor) -> tuple[bool, torch.dtype | None]:
    on = torch.is_autocast_enabled(x.device.type)
    return on, torch.get_autocast_dtype(x.device.type) if on else None
