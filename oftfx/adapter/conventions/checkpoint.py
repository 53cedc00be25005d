"""The ``state_dict`` of a transformed model: a Trainer's checkpoint, ``save_pretrained``, a saved ``state_dict``.

It has the numbers ``<layer>.oft.<adapter>.skew`` and not what they mean, so the model has to have the adapter:
transform it by the same rules first.
"""

from __future__ import annotations

import re

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.conventions.base import Convention
from oftfx.adapter.conventions.source import Source
from oftfx.adapter.store import AdapterStore
from oftfx.errors import AdapterError, AdapterFileError
from oftfx.rotation.module import Rotation

_SKEW = re.compile(r"(?:^|.*\.)oft(?:_\w+)?\.(?P<adapter>[\w-]+)\.skew")


class Checkpoint(Convention):
    """Of our own rotations."""

    name = "checkpoint"
    made_by = "state_dict of a model with rotations"

    def recognizes(self, source: Source) -> bool:
        """By the names of rotations."""
        return bool(names_in(source))


def names_in(source: Source) -> list[str]:
    """The adapters that a checkpoint holds."""
    return sorted({found["adapter"] for k in source.heads if (found := _SKEW.fullmatch(k))})


def tensors_of(source: Source, root: nn.Module, store: AdapterStore | None, adapter: str) -> dict[nn.Parameter, Tensor]:
    """What a checkpoint holds of an adapter that is in the model, by the parameter that it goes into.

    Args:
        source: the checkpoint.
        root: the model.
        store: its adapters; None for none.
        adapter: name in the model; in the checkpoint too, unless there is one only.

    Raises:
        AdapterError: the model does not have the adapter, or shapes differ.
        AdapterFileError: the checkpoint has other adapters, or lacks something of this one.
    """
    there = names_in(source)
    if store is None or adapter not in store.adapters:
        raise AdapterError(
            f"{source.path} is a checkpoint of a model with rotations ({', '.join(there)}). It has their numbers and "
            "not how they become rotations: transform the model by the rules it was trained with, "
            f"adapter={adapter!r}, then load. save_adapter writes files that say all of it"
        )
    name = adapter if adapter in there else there[0]
    if name != adapter and len(there) > 1:
        raise AdapterFileError(
            f"{source.path}: no adapter {adapter!r}, but {', '.join(there)}; load under one of these names"
        )
    wanted: dict[str, Tensor] = {}
    for path, module in root.named_modules():
        if isinstance(module, Rotation) and path.endswith(f".{adapter}"):
            wanted[f"{path.removesuffix(adapter)}{name}.skew"] = module.skew
    own = store.trained[adapter]
    seen: set[int] = set()
    for parameter in store.adapters[adapter].plan.train:
        if id(own[parameter]) not in seen:  # of a tied one, a checkpoint has the first name only
            wanted[parameter] = own[parameter]
            seen.add(id(own[parameter]))
    wanted |= {
        n: store.buffers.own[adapter][n] for n in store.adapters[adapter].plan.train_buffers if n in source.heads
    }
    if missing := next((n for n in wanted if n not in source.heads), None):
        raise AdapterFileError(f"{source.path}: no {missing}, which adapter {adapter!r} of this model has")
    known = {k for k in wanted if k.endswith(".skew")}
    if extra := next(
        (k for k in source.heads if (m := _SKEW.fullmatch(k)) and m["adapter"] == name and k not in known), None
    ):
        raise AdapterFileError(
            f"{source.path}: has {extra}, and adapter {adapter!r} of this model rotates nothing there"
        )
    for key, parameter in wanted.items():
        if source.heads[key].shape != tuple(parameter.shape):
            raise AdapterError(
                f"{source.path}: {key} has shape {source.heads[key].shape}, the model's {tuple(parameter.shape)}; "
                "transform the model by the rules that the checkpoint was trained with"
            )
    read = source.tensors(wanted)
    return {parameter: read[key] for key, parameter in wanted.items()}  # type: ignore[misc]


@torch.no_grad()
def fill(found: dict[nn.Parameter, Tensor]) -> None:
    """Put the numbers where they belong."""
    for parameter, tensor in found.items():
        parameter.copy_(tensor)
