"""Buffers of the modules that train whole: the base's, and each adapter's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.model.index import ModelIndex


class BufferVersions:
    """What the forward of a module writes while it trains (a batch norm's statistics) belongs to what it trained.

    One version of each buffer is in the model; the others wait here. A forward may write into a buffer or put another
    tensor in its place, so the model's is what counts, and is learned before another one takes its place.

    Attributes:
        originals: the base's version of every buffer that some adapter has of its own, by name.
        own: for each adapter, its versions.
    """

    __slots__ = ("originals", "own")  # so a structural copy, which shares what attributes hold, has versions of its own

    def __init__(self) -> None:
        self.originals: dict[str, Tensor] = {}
        self.own: dict[str, dict[str, Tensor]] = {}

    def add(self, index: ModelIndex, adapter: str, names: Iterable[str]) -> None:
        """Give an adapter copies of the base's versions; names of one buffer share one copy."""
        live = {name: self.originals.get(name, buffer) for name, buffer in index.buffers.items()}
        wanted = {id(live[name]) for name in names}
        copies: dict[int, Tensor] = {}
        own: dict[str, Tensor] = {}
        for name, buffer in live.items():
            if id(buffer) in wanted:
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer.detach().clone()
                self.originals.setdefault(name, buffer)
                own[name] = copies[id(buffer)]
        self.own[adapter] = own

    def remove(self, adapter: str) -> None:
        """Forget an adapter that does not act."""
        del self.own[adapter]

    def mount(self, root: nn.Module, active: Sequence[str]) -> None:
        """Put the versions of the adapters that act into the model, and the base's where none has its own."""
        for name in self.originals:
            versions, live = self._versions(name, active), _get(root, name)
            new = versions[name]
            if live is not None and (new.dtype != live.dtype or new.device != live.device):
                # The model was moved or cast meanwhile, which only reaches what is mounted.
                new = versions[name] = new.to(live.device, live.dtype)
            _put(root, name, new)

    def take_back(self, root: nn.Module, active: Sequence[str]) -> None:
        """Learn what has become of the versions in the model; ``active`` are the adapters they were mounted for."""
        for name in self.originals:
            live = _get(root, name)
            if live is not None:
                self._versions(name, active)[name] = live

    @torch.no_grad()
    def fill(self, adapter: str, name: str, value: Tensor) -> None:
        """Set the numbers of one buffer of an adapter."""
        self.own[adapter][name].copy_(value)

    def _versions(self, name: str, active: Sequence[str]) -> dict[str, Tensor]:
        owners = [n for n in active if name in self.own.get(n, {})]
        return self.own[owners[-1]] if owners else self.originals


def _get(root: nn.Module, name: str) -> Tensor | None:
    owner, _, leaf = name.rpartition(".")
    return root.get_submodule(owner)._buffers[leaf]


def _put(root: nn.Module, name: str, buffer: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    root.get_submodule(owner)._buffers[leaf] = buffer
