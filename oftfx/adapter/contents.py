"""What a file of one adapter holds, by its keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn as nn
from torch import Tensor

from oftfx.adapter import peft_files
from oftfx.adapter.store import AdapterStore
from oftfx.errors import AdapterError
from oftfx.placement.find import rotated_sites
from oftfx.planning.plans import Plan


def adapter_tensors(root: nn.Module, store: AdapterStore, adapter: str) -> list[tuple[str, Tensor]]:
    """What a file of one adapter holds: skews and whole parameters by their keys."""
    rotations = rotation_by_site(root, store, adapter)
    plan = store.adapters[adapter].plan
    skews = [(peft_files.key_of_skew(e.site), rotations[e.fqn].every_skew()) for e in plan]
    return skews + whole_tensors(root, store, adapter)


def whole_tensors(root: nn.Module, store: AdapterStore, adapter: str) -> list[tuple[str, Tensor]]:
    """What it holds besides rotations: whole parameters and their buffers."""
    plan = store.adapters[adapter].plan
    rotated = [e.fqn for e in plan]
    store.take_back(root)
    named = (*plan.train, *plan.brought)
    result = [(peft_files.key_of_parameter(n, rotated), store.trained[adapter][n]) for n in named]
    return result + [(peft_files.PREFIX + n, store.buffers.own[adapter][n]) for n in saved_buffers(root, plan)]


def saved_buffers(root: nn.Module, plan: Plan) -> list[str]:
    """Those of an adapter's buffers that a ``state_dict`` holds."""
    walked = root.named_modules(remove_duplicate=False)
    left_out = {f"{path}.{name}" for path, module in walked for name in module._non_persistent_buffers_set}
    return [name for name in plan.train_buffers if name not in left_out]


def rotation_by_site(root: nn.Module, store: AdapterStore, adapter: str) -> dict[str, Any]:
    """The rotations of one adapter by the path that their site had when they were put there."""
    rotations = {fqn: p.rotations[adapter] for fqn, p in rotated_sites(root) if adapter in p.rotations}
    moved = {entry.fqn: _now(entry.fqn, rotations) for entry in store.adapters[adapter].plan}
    return {fqn: rotations[now] for fqn, now in moved.items()}


def check_in_place(root: nn.Module, store: AdapterStore, adapter: str) -> None:
    """Raise `AdapterError` where a site is not where it was put: another layer has been wrapped around it."""
    rotated = dict(rotated_sites(root))
    for entry in store.adapters[adapter].plan:
        if entry.fqn not in rotated:
            raise AdapterError(
                f"{entry.fqn} is inside another layer now ({_now(entry.fqn, rotated)}), so no file of this adapter "
                "would fit the model. Take that away first (unload() of a PeftModel; merge_adapter() would put its "
                "update behind the rotation), or fold before"
            )


def _now(fqn: str, found: Mapping[str, Any]) -> str:
    return fqn if fqn in found else next(f for f in found if f.startswith(f"{fqn}."))
