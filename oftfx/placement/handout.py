"""Results for several readers of the same tensor, made at once and handed to each."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from oftfx.placement.torch_private import saved_tensor_hooks, traced_version


class _Waiting(dict[str, Tensor]):
    """What the other members of a group have not taken yet.

    Args:
        results: of all members.
        taken: the member that has its part.
        source: the tensor they were made of.
        key: what else they were made with.
    """

    def __init__(self, results: Mapping[str, Tensor], taken: str, source: Tensor, key: Any) -> None:
        super().__init__((m, t) for m, t in results.items() if m != taken)
        # A member that is never called must not keep its result: it goes with x, or when its graph is used up.
        drop = _Drop(self)
        self.source, self.key = weakref.ref(source, drop), key
        for result in {id(t): t for t in results.values()}.values():
            if result.requires_grad:
                result.register_hook(drop)


class _Drop:
    """Empties what waits; keeps nothing alive, as it hangs on the very tensors that wait."""

    def __init__(self, waiting: _Waiting) -> None:
        self.waiting = weakref.ref(waiting)

    def __call__(self, _: object) -> None:
        waiting = self.waiting()
        if waiting is not None:
            waiting.clear()


class HandOut:
    """Keeps what was made of a tensor only until each member of a group has taken its part.

    Nothing outlives the forward, and a recomputation (gradient checkpointing) starts afresh: a member that asks twice
    gets a new result. The source tensor is known by identity and version, through a weak reference. Each thread has its
    own results: two that read the same tensor would otherwise share a graph, which only one of them can go back
    through.

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
        self._here = threading.local()

    @property
    def waiting(self) -> Mapping[str, Tensor]:
        """What this thread's next members will be given."""
        return getattr(self._here, "waiting", {})

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
        key = (x._version, x.requires_grad, torch.is_grad_enabled(), _autocast(x), saved_tensor_hooks(), state())
        waiting: _Waiting | None = getattr(self._here, "waiting", None)
        if waiting is not None and waiting.source() is x and waiting.key == key:
            part = waiting.pop(member, None)
            if part is not None:
                return part
        results = everything()
        self._here.waiting = _Waiting(results, member, x, key)
        return results[member]

    def _take_traced(
        self, x: Tensor, member: str, everything: Callable[[], Mapping[str, Tensor]], alone: Callable[[], Tensor]
    ) -> Tensor:
        if torch.compiler.is_dynamo_compiling() and not self.local:
            return alone()
        version = traced_version(x)
        made = getattr(x, self.attribute, None)
        if made is None or made[0] != version:
            made = (version, everything())
            setattr(x, self.attribute, made)
        return made[1][member]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_here"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()


def _autocast(x: Tensor) -> tuple[bool, torch.dtype | None]:
    on = torch.is_autocast_enabled(x.device.type)
    return on, torch.get_autocast_dtype(x.device.type) if on else None
