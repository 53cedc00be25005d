"""Tell one tensor from another that came to stand in its place."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

from torch import Tensor

_NUMBERS = itertools.count(1)


class Identity:
    """Numbers the tensors that stand at one place: an address and a version are soon used again by another object."""

    _seen: tuple[weakref.ref[Tensor], int] | None = None

    def of(self, tensor: Tensor) -> int:
        """A number that is another one whenever the object is; no two places ever give the same."""
        seen = self._seen  # one object with its number: another thread may replace it
        if seen is None or seen[0]() is not tensor:
            seen = self._seen = (weakref.ref(tensor), next(_NUMBERS))
        return seen[1]

    def forget(self) -> None:
        """Let also the same object get another number."""
        self._seen = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_seen": None}
