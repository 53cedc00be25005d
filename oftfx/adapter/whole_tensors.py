"""What an adapter file holds besides rotations: what trains whole with its buffers, biases, and base weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oftfx.adapter.store import AdapterStore
from oftfx.errors import AdapterError, AdapterFileError
from oftfx.model.index import ModelIndex
from oftfx.planning.peft_selection import whole_modules
from oftfx.planning.plans import Plan
from oftfx.rotation.module import whole


@dataclass(frozen=True)
class Whole:
    """The names of a file's tensors by their meaning; see `Plan` for what each is.

    PEFT also puts base weights into a file: those of an embedding that it rotates, or whose vocabulary was resized.
    They never train there. Where they are the model's own numbers, nothing is done with them.
    """

    train: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    bias: str = "none"
    buffers: tuple[str, ...] = ()
    brought: tuple[str, ...] = ()


def whole_in_plan(plan: Plan) -> Whole:
    """What our own convention says of itself."""
    return Whole(plan.train, plan.train_modules, plan.train_bias, plan.train_buffers, plan.brought)


def whole_in_config(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], index: ModelIndex, store: AdapterStore | None
) -> Whole:
    """What PEFT's configuration says of the tensors of its file."""
    modules = whole_modules(config, index, loading=True)
    bias = {"oft_only": "oft"}.get(config.get("bias") or "none", config.get("bias") or "none")

    def trains(name: str) -> bool:
        return _is_inside(name, modules) or (bias != "none" and name.endswith("bias"))

    base = {n: (store.originals if store else {}).get(n, p) for n, p in index.parameters.items()}
    return Whole(
        tuple(n for n in base if n in tensors and trains(n)),
        tuple(m for m in modules if any(_is_inside(n, (m,)) for n in tensors)),
        bias,
        tuple(n for n in index.buffers if n in tensors or _is_inside(n, modules)),
        tuple(n for n, p in base.items() if n in tensors and not trains(n) and not _same(tensors[n], p)),
    )


def check_whole(found: Whole, tensors: Mapping[str, Tensor], index: ModelIndex, where: Path) -> None:
    """Compare a file's tensors with the model's.

    Raises:
        AdapterError: a name that the model does not have, or another shape or kind of number.
        AdapterFileError: something is missing in the file.
    """
    known: dict[str, Tensor] = {**index.buffers, **index.parameters}
    for name, tensor in tensors.items():
        if name not in known:
            raise AdapterError(
                f"{where}: holds {name}, which is no parameter and no buffer of {type(index.model).__name__}"
            )
        here = known[name]
        if here.shape != tensor.shape:
            raise AdapterError(f"{where}: {name} has shape {tuple(tensor.shape)}, the model's {tuple(here.shape)}")
        if here.is_floating_point() != tensor.is_floating_point():
            raise AdapterFileError(f"{where}: {name} has dtype {tensor.dtype}, the model's {here.dtype}")
    saved = {f"{path}.{n}" for m, every in index.paths.items() for path in every for n in _state_of(m)}
    inside = (n for n in known if _is_inside(n, found.modules) and n in saved)
    tied = {id(known[n]) for n in tensors}
    if missing := [n for n in inside if n not in tensors and id(known[n]) not in tied]:
        raise AdapterFileError(
            f"{where}: no {missing[0]}"
            + (f" and {len(missing) - 1} more tensors" if missing[1:] else "")
            + f" of {next(m for m in found.modules if _is_inside(missing[0], (m,)))}, which trains whole; is the file "
            "complete?"
        )


def _state_of(module: torch.nn.Module) -> set[str]:
    return {*module._parameters, *module._buffers} - module._non_persistent_buffers_set


def _is_inside(name: str, modules: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _same(saved: Tensor, parameter: Tensor) -> bool:
    here = whole(parameter).detach()
    if here.is_meta or here.shape != saved.shape:
        return False
    return torch.equal(saved.to(here.device, here.dtype), here)
