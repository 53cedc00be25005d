"""What it takes to bring a model back that is changed in place."""

from __future__ import annotations

from typing import Protocol

import torch.nn as nn


class Undoable(Protocol):
    """Something that was there before a change."""

    def restore(self, model: nn.Module) -> None:
        """Bring it back."""


class Journal:
    """Notes each change before it is made.

    Args:
        keep: whether to remember what was there, which keeps the old weights alive; otherwise changes are only counted.

    Attributes:
        sites: how many sites have begun to change.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self.keep, self.sites = keep, 0
        self._entries: list[Undoable] = []

    def note(self, entry: Undoable) -> None:
        """Remember what was there."""
        if self.keep:
            self._entries.append(entry)

    def restore(self, model: nn.Module) -> None:
        """Bring everything back, the latest first."""
        while self._entries:
            self._entries.pop().restore(model)
