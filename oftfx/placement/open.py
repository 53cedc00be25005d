"""How many calls of a kind are under way: cheap to ask, and compiled code is compiled again when there are any."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


class Open:
    """How many calls of a kind are open in this process."""

    def __init__(self) -> None:
        self.any = False
        self._count = 0
        self._lock = threading.Lock()

    def change(self, by: int) -> None:
        """One more, or one less."""
        with self._lock:
            self._count += by
            self.any = self._count > 0


@contextmanager
def opened(kind: Open, variable: ContextVar[T], value: T) -> Iterator[None]:
    """One more call of a kind inside; what it is about is the value of a context variable, in this thread."""
    token = variable.set(value)
    kind.change(1)
    try:
        yield
    finally:
        kind.change(-1)
        variable.reset(token)


OPEN = Open()
"""Those with rows that have adapters of their own; see `oftfx.placement.rows`."""
