"""Bytes of the storages that torch operations make, those alive and the most there ever were."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class StorageTracker:
    """Counts storages that are made while `watching` is on, until they die; views and in-place results count once.

    Storages from before do not count, also where they die. What a kernel allocates for itself while it runs is not
    seen: results of operations are. Dispatch modes belong to a thread, so every thread that is to be watched enters
    a `watching` of its own.

    Attributes:
        live: bytes of the counted storages that are alive.
        peak: the largest `live` since the last `reset`.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}

    def watching(self) -> AbstractContextManager[Any]:
        """Count what is made inside, in this thread."""
        return _Watch(self)

    def reset(self) -> int:
        """Begin a new peak at what is alive now, and return that."""
        self.peak = self.live
        return self.live

    def add(self, results: Any, known: Sequence[Tensor] = ()) -> None:
        """Count the storages of an operation's results, but for those that it was given."""
        given = {id(t.untyped_storage()) for t in known}
        for tensor in pytree.tree_leaves(results):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                if id(storage) not in given:
                    self._count(storage)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # the object lives as long as the memory, and no other has its number until then
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        del self._references[key]
        self.live -= self._sizes.pop(key)


class _Watch(TorchDispatchMode):
    def __init__(self, tracker: StorageTracker) -> None:
        super().__init__()
        self.tracker = tracker

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.layout is torch.strided]
        self.tracker.add(result, given)
        return result
