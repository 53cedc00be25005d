"""Tell one tensor from another that came to stand in its place."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor


class Identity:
    """Numbers the tensors that stand at one place: an address and a version are soon used again by another object."""

    def __init__(self) -> None:
        self._seen: weakref.ref[Tensor] | None = None
        self._number = 0

    def of(self, tensor: Tensor) -> int:
        """A number that is another one whenever the object is."""
        if self._seen is None or self._seen() is not tensor:
            self._seen = weakref.ref(tensor)
            self._number += 1
        return self._number

    def forget(self) -> None:
        """Let also the same object get another number."""
        self._seen = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}
