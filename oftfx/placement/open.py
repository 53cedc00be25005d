"""How many calls of a kind are under way: cheap to ask, and compiled code is compiled again when there are any."""

from __future__ import annotations

import threading


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


OPEN = Open()
"""Those with rows that have adapters of their own; see `oftfx.placement.rows`."""
