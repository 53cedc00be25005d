"""The blocks of adapters under the names that they have in a graph, ``<site>.oft.blocks``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.store import located
from oftfx.errors import ExportError
from oftfx.placement.find import rotated_sites
from oftfx.placement.frozen import blocks_of
from oftfx.rotation.module import Rotation


@dataclass(frozen=True)
class Slots:
    """Where a graph takes blocks.

    Attributes:
        names: for each rotated site the name of its blocks; sites that share a rotation share the name.
        shapes: ``(blocks, b, b)`` by name.
        dtype: of all of them.
    """

    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module, adapter: str) -> Slots:
        """The slots of a graph that is made for an adapter.

        Raises:
            AdapterError: no adapter of that name.
            ExportError: it is more than rotations.
        """
        rotations = _rotations(model, adapter)
        paths = {id(m): n for n, m in located(model)[0].named_modules() if isinstance(m, Rotation)}
        names = {fqn: f"{paths[id(r)].rpartition('.')[0]}.blocks" for fqn, r in rotations.items()}
        shapes = {names[fqn]: (r.blocks, r.block_size, r.block_size) for fqn, r in rotations.items()}
        return cls(names, shapes, torch.promote_types(next(iter(rotations.values())).skew.dtype, torch.float32))


def adapter_blocks(model: nn.Module, adapter: str, slots: Slots) -> dict[str, Tensor]:
    """The blocks of an adapter as a graph takes them: ``(blocks, b, b)`` by name, without those it does not rotate.

    Where the adapter shares a rotation between sites that have slots of their own, each gets a copy.

    Raises:
        AdapterError: no adapter of that name.
        ExportError: it is more than rotations, or it does not fit the graph.
    """
    rotations = _rotations(model, adapter)
    found: dict[str, Tensor] = {}
    for fqn, rotation in rotations.items():
        if fqn not in slots.names:
            raise ExportError(
                f"adapter {adapter!r} rotates {fqn}, which the graph does not: it rotates "
                f"{', '.join(list(slots.names)[:3])}, ... Adapters that share a graph need the same rules"
            )
        name = slots.names[fqn]
        others = [f for f, n in slots.names.items() if n == name and rotations.get(f) is not rotation]
        if others:
            raise ExportError(
                f"the graph has one rotation for {fqn} and {others[0]}, adapter {adapter!r} has not; adapters that "
                "share a graph need the same share_input, or make the graph from the adapter that does not share"
            )
        if name not in found:
            found[name] = blocks_of(rotation).to(slots.dtype)
        if tuple(found[name].shape) != tuple(slots.shapes[name]):
            raise ExportError(
                f"adapter {adapter!r} has blocks {tuple(found[name].shape)} at {fqn}, the graph "
                f"{tuple(slots.shapes[name])}; adapters that share a graph need the same block sizes"
            )
    return found


def identity_like(blocks: Tensor) -> Tensor:
    """As many identity blocks: the base model."""
    return torch.eye(blocks.shape[-1], dtype=blocks.dtype).expand_as(blocks).contiguous()


def _rotations(model: nn.Module, adapter: str) -> dict[str, Rotation]:
    """By site."""
    root, store = located(model)
    store.require(adapter)
    if own := sorted(store.own(adapter)):
        raise ExportError(
            f"adapter {adapter!r} also has {own[0]}"
            + (f" and {len(own) - 1} more tensors" if own[1:] else "")
            + " of its own, trained whole; a swappable adapter is rotations only. Export with adapters='fixed'"
        )
    found = {fqn: p.rotations[adapter] for fqn, p in rotated_sites(root) if adapter in p.rotations}
    if not found:
        raise ExportError(f"adapter {adapter!r} has no rotations")
    return found
