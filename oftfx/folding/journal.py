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
        keep: whether to remember every site, which keeps the old weights alive; otherwise only the one under way.

    Attributes:
        done: how many sites have changed.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self.keep, self.done = keep, 0
        self._entries: list[Undoable] = []

    def note(self, entry: Undoable) -> None:
        """Remember what was there."""
        self._entries.append(entry)

    def site_done(self) -> None:
        """One site is what it is to become."""
        self.done += 1
        if not self.keep:
            self._entries.clear()

    def restore(self, model: nn.Module) -> None:
        """Bring back what is remembered, the latest first."""
        while self._entries:
            self._entries.pop().restore(model)
