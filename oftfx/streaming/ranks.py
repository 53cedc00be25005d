"""One fold by several processes that `torchrun` has started: who does what, and how they wait for each other."""

from __future__ import annotations

import contextlib
import heapq
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from oftfx.errors import FoldError
from oftfx.folding.peers import Peers, own_group
from oftfx.folding.shards import gathered

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes, and which of them this is.

    Attributes:
        rank: from 0.
        world: how many there are.
        group: in which they talk; None for one alone.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    @classmethod
    @contextlib.contextmanager
    def here(cls) -> Iterator[Ranks]:
        """As `torchrun` says in the environment."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1 or "RANK" not in os.environ:
            yield cls()
            return
        with own_group() as found:
            yield cls(*found)

    @property
    def first(self) -> bool:
        """Whether this is the one that prepares and ends."""
        return self.rank == 0

    @property
    def peers(self) -> Peers:
        """The same processes, for what they do step by step."""
        return Peers(self.rank, self.world, self.group)

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; so is what it raises.

        Raises:
            FoldError: it failed there, or a process has died.
        """
        if self.world == 1:
            return make()
        value, error = None, None
        if self.first:
            try:
                value = make()
            except Exception as raised:
                error = raised
        said = self._gathered((value, _text(error)))[0]
        if error is not None:
            raise error
        if said[1]:
            raise FoldError(f"the first process: {said[1]}")
        found: T = said[0]
        return found

    def all_do(self, work: Callable[[], None]) -> None:
        """Each does its share; what fails in one is raised in all.

        Raises:
            FoldError: it failed in another, or a process has died.
        """
        error: Exception | None = None
        try:
            work()
        except Exception as raised:
            error = raised
        texts = self._gathered(_text(error)) if self.world > 1 else []
        if error is not None:
            raise error
        for rank, text in enumerate(texts):
            if text:
                raise FoldError(f"process {rank}: {text}. What was written stays; run the same again")

    def shares(self, sizes: Mapping[int, int]) -> list[list[int]]:
        """For each process the keys that it treats: the largest first, to whoever has least."""
        heap, found = [(0, rank) for rank in range(self.world)], [list[int]() for _ in range(self.world)]
        for key in sorted(sizes, key=lambda k: (-sizes[k], k)):
            load, rank = heapq.heappop(heap)
            found[rank].append(key)
            heapq.heappush(heap, (load + sizes[key], rank))
        return [sorted(keys) for keys in found]

    def _gathered(self, value: Any) -> list[Any]:
        return gathered(value, self.group, "What was written stays; run the same again, with any number of processes")


def _text(error: Exception | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"
