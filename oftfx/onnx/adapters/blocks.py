"""The blocks of adapters under the names that they have in a graph, ``<site>.oft.blocks``."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.store import located
from oftfx.errors import ExportError
from oftfx.passes.freeze_rotations import blocks_of
from oftfx.placement import rotated_sites
from oftfx.program import Program
from oftfx.rotation.module import FrozenRotation, Rotation


def block_name(path: str) -> str:
    """Of the rotation whose module path is ``<site>.oft.<adapter>``."""
    return f"{path.rpartition('.')[0]}.blocks"


def adapter_blocks(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Every rotation of an adapter: ``(blocks, b, b)`` by name, in float32 or wider.

    Raises:
        AdapterError: no adapter of that name.
        ExportError: it is more than rotations.
    """
    root, store = located(model)
    store.require(adapter)
    if own := sorted(store.trained[adapter]):
        raise ExportError(
            f"adapter {adapter!r} also has {own[0]}"
            + (f" and {len(own) - 1} more parameters" if own[1:] else "")
            + " of its own, trained whole; a swappable adapter is rotations only. Export with adapters='fixed'"
        )
    found = {
        block_name(path): blocks_of(module)
        for path, module in root.named_modules()
        if isinstance(module, Rotation) and path.rpartition(".")[2] == adapter
    }
    if not found:
        raise ExportError(f"adapter {adapter!r} has no rotations")
    return found


def block_names(model: nn.Module) -> dict[str, str]:
    """For each site that rotates now, the name of its blocks; sites that share a rotation share its name."""
    paths = {id(m): n for n, m in model.named_modules() if isinstance(m, (Rotation, FrozenRotation))}
    return {fqn: block_name(paths[id(p.in_effect()[0])]) for fqn, p in rotated_sites(model) if p.in_effect()}


def identity_like(blocks: Tensor) -> Tensor:
    """As many identity blocks: the base model."""
    return torch.eye(blocks.shape[-1], dtype=blocks.dtype).expand_as(blocks).contiguous()


def check_fit(adapter: str, blocks: Mapping[str, Tensor], graph: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `ExportError` where a graph with blocks of these shapes cannot hold an adapter."""
    for name, value in blocks.items():
        site = name.removesuffix(".blocks")
        if name not in graph:
            raise ExportError(
                f"adapter {adapter!r} rotates {site}, which the graph does not: its rotations are "
                f"{', '.join(list(graph)[:3])}, ... Adapters that share a graph need the same rules"
            )
        if tuple(value.shape) != graph[name]:
            raise ExportError(
                f"adapter {adapter!r} has blocks {tuple(value.shape)} at {site}, the graph {graph[name]}; adapters "
                "that share a graph need the same block sizes"
            )


def interface_of(model: nn.Module) -> int:
    """A number for the layers of a model, whatever stores their weights: 31 bits of their paths and sizes.

    An ``.onnx_adapter`` file has room for one number; so an adapter of another model is told from one of this.
    """
    layers = sorted((s.fqn, s.in_features, s.out_features) for s in Program.of(model).sites)
    return zlib.crc32(json.dumps([type(model).__name__, layers]).encode()) >> 1
