"""A model whose layers have their weights while somebody uses them."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn as nn

from oftfx.errors import FoldError
from oftfx.model.structure import HOOKS
from oftfx.placement.base import SiteRotations
from oftfx.rotation.accelerate import FORWARD

_STAYS = {*HOOKS, "_modules", "training", "forward", FORWARD}
"""Attributes of a layer that are no part of its weights: hooks, rotations, what takes the place of its forward."""
_AROUND = 1 << 16
"""Bytes that the system reads around a page of a file, so that a norm costs more than it has."""
_REPEATED = re.compile(r"^(.*?\.\d+)\.")


class Resident:
    """Brings a layer its tensors when a forward enters it, and takes them away once others need the room.

    A module stays for good where it has children: a forward may be in one of them while it waits.

    Args:
        layers: those that have tensors of their own, by path; they are without them now.
        bring: gives a layer its tensors; called with path and layer.
        sizes: bytes of each layer.
        room: that all together take at most, besides one layer.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        bring: Callable[[str, nn.Module], None],
        sizes: Mapping[str, int],
        room: int,
    ) -> None:
        self._bring, self._sizes, self._room = bring, sizes, room
        self._paths = {layer: path for path, layer in layers.items()}
        self._bare = {layer: _own(layer) for layer in layers.values()}
        self._here: OrderedDict[nn.Module, int] = OrderedDict()
        for layer in layers.values():
            layer.register_forward_pre_hook(self._enter, prepend=True)

    def take(self, layer: nn.Module) -> None:
        """Take its tensors away, if it has them."""
        if self._here.pop(layer, None) is None:
            return
        for name in [n for n in vars(layer) if n not in _STAYS]:
            del vars(layer)[name]
        vars(layer).update(_copied(self._bare[layer]))

    def take_all(self) -> None:
        """Of every layer."""
        for layer in list(self._here):
            self.take(layer)

    def _enter(self, layer: nn.Module, _: Any) -> None:
        if layer in self._here:
            self._here.move_to_end(layer)
            return
        path = self._paths[layer]
        self._bring(path, layer)
        self._here[layer] = self._sizes.get(path, 0) + _AROUND
        for other in [m for m in self._here if m is not layer and _is_leaf(m)]:
            if sum(self._here.values()) <= self._room:
                break
            self.take(other)


def room_of(sizes: Mapping[str, int]) -> int:
    """Bytes of the largest of a model's repeated parts (its decoder layers, say), by those of its layers."""
    parts = Counter[str]()
    for path, size in sizes.items():
        found = _REPEATED.match(f"{path}.")
        parts[found.group(1) if found else path] += size if found else 0
    return max(parts.values(), default=0)


def cannot_run(path: str, error: Exception) -> FoldError:
    """For a model whose code reads a weight of a layer that it does not call."""
    return FoldError(
        f"the model cannot run layer by layer ({error}): its code reads a tensor of a layer that it does not call"
        f"{f', after {path}' if path else ''}; load the model and use oftfx.fold"
    )


def _is_leaf(layer: nn.Module) -> bool:
    return all(isinstance(child, SiteRotations) for child in layer.children())


def _own(layer: nn.Module) -> dict[str, Any]:
    return _copied({n: v for n, v in vars(layer).items() if n not in _STAYS})


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v.copy() if isinstance(v, (dict, set)) else v for n, v in values.items()}
