"""Find the placements of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn as nn

from oftfx.errors import AdapterError
from oftfx.model.index import ModelIndex
from oftfx.model.names import join
from oftfx.placement.base import Placement, owner_of


def placements_on(module: nn.Module) -> list[Placement]:
    """The placements whose hooks are on a module, each once."""
    found: dict[int, Placement] = {}
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for hook in hooks.values():
            owner = owner_of(hook)
            if owner is not None:
                found.setdefault(id(owner), owner)
    return list(found.values())


def rotated_sites(model: nn.Module | ModelIndex) -> Iterator[tuple[str, Placement]]:
    """Every placement in a model with the path of its site; each once."""
    index = ModelIndex.of(model)
    for module in index.paths:
        for placement in placements_on(module):
            if placement.module in index.paths:
                yield join(index.path(placement.module), placement.parameter), placement


@contextmanager
def without_rotation(module: nn.Module) -> Iterator[None]:
    """The bare module: inside, no hook of ours on it does anything."""
    found = placements_on(module)
    states = [(p.active, p.fixed, p.ran) for p in found]
    for placement in found:
        placement.active, placement.fixed = (), []
    try:
        yield
    finally:
        for placement, (active, fixed, ran) in zip(found, states, strict=True):
            placement.active, placement.fixed, placement.ran = active, fixed, ran


def check_unaware(model: nn.Module, what: str) -> None:
    """Refuse what would leave out that sites compute with their fold.

    Raises:
        AdapterError: some do.
    """
    if site := next((fqn for fqn, p in rotated_sites(model) if p.fold_in_effect() is not None), None):
        raise AdapterError(
            f"{what} of a fold-aware model: {site} computes with the weight that its own fold will write. Fold first "
            "(oftfx.fold(model)), or let the rotations act again: oftfx.fold_aware(model, None)"
        )
