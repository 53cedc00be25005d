"""What a fold has to bring back, and what belongs to its result alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn as nn

from oftfx.adapter.fixed_rotations import guard_saving
from oftfx.adapter.store import AdapterStore, find_store, keep_store, located
from oftfx.errors import FoldError
from oftfx.folding.journal import Journal
from oftfx.folding.note import forget_fold
from oftfx.model.huggingface import QuantizerNotes
from oftfx.model.structure import structural_copy
from oftfx.placement.aware import Aware
from oftfx.placement.torch_private import forget_compiled
from oftfx.rotation.module import Rotation

_LAST = "_oftfx_last_fold"
"""Attribute of a model: tells the fold in place that was last, and can be undone, from all others."""


class Token:
    """Equal to itself alone; a copy of a model has another one, which no result knows."""


def own_copy(model: nn.Module) -> nn.Module:
    """A structure of its own over the same frozen weights, with own values of everything that trains."""
    result = structural_copy(model)
    trained = [p for own in located(result)[1].trained.values() for p in own.values()]
    skews = [m.skew for m in result.modules() if isinstance(m, Rotation)]
    shifts = [p for m in result.modules() if isinstance(m, Aware) for p in m.parameters()]
    with torch.no_grad():
        for parameter in {id(p): p for p in (*trained, *skews, *shifts)}.values():
            parameter.data = parameter.detach().clone()
    return result


@dataclass(frozen=True)
class Before:
    """What a fold in place has to bring back besides the sites themselves."""

    store: AdapterStore
    active: tuple[str, ...]
    trainable: tuple[nn.Parameter, ...]
    quantizer: QuantizerNotes
    journal: Journal
    earlier: Token | None = None
    token: Token = field(default_factory=Token)

    @classmethod
    def of(cls, model: nn.Module, store: AdapterStore, journal: Journal) -> Before:
        """The state now; ``journal`` will know what happened to each site."""
        trainable = tuple(p for p in store.parameters(tuple(store.adapters)) if p.requires_grad)
        return cls(store, store.active, trainable, QuantizerNotes(model), journal, vars(model).get(_LAST))

    def close(self, model: nn.Module) -> None:
        """The fold is done; it is the next one that may be undone, if anything was kept for that."""
        vars(model).pop(_LAST, None)
        if self.journal.keep:
            vars(model)[_LAST] = self.token

    def check(self, model: nn.Module) -> None:
        """Raise `FoldError` where the model is not any more what the fold left."""
        store = find_store(model)
        if store is not None and store.adapters:
            raise FoldError(
                "the model has been transformed again since this fold, and undoing it would let both adapters act; "
                "fold and unfold the later one first"
            )
        if vars(model).get(_LAST) is not self.token:
            raise FoldError("this fold was undone already, or another fold has followed; unfold that one first")

    def restore(self, model: nn.Module) -> None:
        """Bring it back into the same model."""
        self.journal.restore(model)
        keep_store(model, self.store)
        self.store.activate(model, self.active)
        for parameter in self.trainable:
            parameter.requires_grad_(True)
        self.quantizer.restore(model)
        forget_compiled()
        vars(model).pop(_LAST, None)
        if self.earlier is not None:
            vars(model)[_LAST] = self.earlier
        forget_fold(model)
        guard_saving(model)
