"""What the folds of one model share while it is changed."""

from __future__ import annotations

from collections import Counter
from weakref import WeakKeyDictionary

import torch.nn as nn

from oftfx.folding.journal import Journal
from oftfx.folding.record import Undo
from oftfx.formats.base import WeightFormat
from oftfx.model.index import ModelIndex
from oftfx.model.structure import HOOKS, replace_module
from oftfx.placement.base import Placement
from oftfx.placement.frozen import Freezer


class Workbench:
    """One model under way from rotated to folded.

    Args:
        index: of the model, which is changed.
        journal: notes what was there.

    Attributes:
        paths: the first path of each module; modules that are replaced go.
        freezer: makes rotations that stay.
    """

    def __init__(self, index: ModelIndex, journal: Journal) -> None:
        self.model, self.journal = index.model, journal
        self.freezer = Freezer()
        self.paths = WeakKeyDictionary({m: paths[0] for m, paths in index.paths.items()})
        self._shared = _shared(index)
        self._replacements: list[tuple[Placement, nn.Module]] = []

    def note(self, placement: Placement, weight_format: WeightFormat) -> None:
        """Remember a site that is about to change."""
        self.journal.note(Undo.of(self.paths[placement.module], placement, weight_format))

    def remark(self, placement: Placement) -> str:
        """For the report, of a weight that another module has as well."""
        shared = id(placement.module._parameters.get(placement.parameter)) in self._shared
        return "its weight was shared with another module and is now its own" if shared else ""

    def replace(self, placement: Placement, new: nn.Module) -> None:
        """Let another layer stand in the place of a site's, from the next `finish` on.

        A forward that is under way while its layer is folded goes on in the old one; until then it has its rotation.
        """
        self._replacements.append((placement, new))

    def finish(self) -> None:
        """Put the new layers into their places."""
        for placement, new in self._replacements:
            placement.drop()
            for name in HOOKS:
                getattr(new, name).update(getattr(placement.module, name))
            replace_module(self.model, placement.module, new)
        self._replacements.clear()


def _shared(index: ModelIndex) -> set[int]:
    """Weights that several modules have; a module with several paths is one."""
    counts = Counter(id(p) for m in index.paths for p in m._parameters.values() if p is not None)
    return {i for i, n in counts.items() if n > 1}
