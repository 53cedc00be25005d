"""Processes that do one thing together: what one of them knows, all know; what fails in one, fails in all."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from oftfx.errors import FoldError
from oftfx.folding.shards import gathered

T = TypeVar("T")
_LONG = datetime.timedelta(days=30)
"""A process that has done its share waits for the others; one that dies closes its connections at once."""
_AGAIN = "Start all of them again"


@contextmanager
def own_group() -> Iterator[tuple[int, int, Any]]:
    """Rank, number and a gloo group of all processes; the process group itself as `torchrun` says, where there is none.

    Groups made here end here: threads of one that is left to the end of the process can abort it (seen in 9 of 75).
    """
    import torch.distributed as dist

    with ExitStack() as stack:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_LONG)
            stack.callback(dist.destroy_process_group)
        group = dist.new_group(backend="gloo", timeout=_LONG)
        stack.callback(dist.destroy_process_group, group)
        yield dist.get_rank(), dist.get_world_size(), group


@dataclass
class Peers:
    """The processes that fold one model together, each with its own share of the inputs.

    Whatever they tell each other begins with what each of them is about to do, so nothing is ever matched with
    something else, and an error takes the place of the next thing that its process would have said.

    Attributes:
        rank: from 0.
        world: how many there are.
        group: in which they talk; None for one alone.
    """

    rank: int = 0
    world: int = 1
    group: Any = None
    _in_step: bool = True

    @classmethod
    @contextmanager
    def joined(cls, wanted: bool) -> Iterator[Peers]:
        """All processes, or with ``wanted=False`` this one alone; what is raised inside is raised in all.

        Raises:
            FoldError: there is nothing that says which processes; or one has failed, or ended.
        """
        if not wanted or (os.environ.get("WORLD_SIZE") == "1" and not _is_initialized()):
            yield cls()
            return
        if not _is_initialized() and "RANK" not in os.environ:
            raise FoldError(
                "distributed=True: no other process is known. Start this program with torchrun, or call "
                "torch.distributed.init_process_group first"
            )
        with own_group() as (rank, world, group):
            peers = cls(rank, world, group)
            with peers.together():
                yield peers

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is raised inside in one is raised in all; all of them have to enter this."""
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise
        self.exchange("end")  # none leaves while another can still fail

    def exchange(self, step: str, value: T | None = None) -> list[T]:
        """What each process gives, in all of them; all of them have to call this.

        Args:
            step: what for.
            value: what can be pickled; of tensors those on the CPU.

        Raises:
            FoldError: another process has failed, or ended, or does something else.
        """
        if self.world == 1:
            return [value]  # type: ignore[list-item]
        self._in_step = False  # what is raised in here is known to all, or there is nobody left to be told
        found = gathered((step, "", value), self.group, _AGAIN)
        for rank, (_, error, _) in enumerate(found):
            if error:
                raise FoldError(f"process {rank} of {self.world}: {error}")
        for rank, (theirs, _, _) in enumerate(found):
            if theirs != step:
                raise FoldError(
                    f"process {rank} of {self.world} is at {theirs!r}, process {self.rank} at {step!r}: all of them "
                    "have to do the same with the same model"
                )
        self._in_step = True
        return [v for _, _, v in found]

    def sums(self, step: str, values: Sequence[float]) -> list[float]:
        """Of each number over all processes, in all of them to the bit."""
        return [sum(column) for column in zip(*self.exchange(step, list(values)), strict=True)]

    def add(self, step: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Of each tensor the sum over all processes, on its own device; what was given may be overwritten."""
        if self.world == 1:
            return list(tensors)
        import torch.distributed as dist

        self.exchange(step, None)
        found = []
        for tensor in tensors:
            total = tensor.cpu()
            try:
                dist.all_reduce(total, group=self.group)
            except RuntimeError as error:  # its connections are closed
                raise FoldError(f"another process has ended early. {_AGAIN}") from error
            found.append(total.to(tensor.device))
        return found

    def check_same(self, step: str, values: Mapping[str, object], remedy: str) -> None:
        """Refuse what is not the same in all processes.

        Raises:
            FoldError: it names the first such thing.
        """
        every = self.exchange(step, dict(values))
        for rank, theirs in enumerate(every):
            for name in (*every[0], *theirs):
                if every[0].get(name) != theirs.get(name):
                    raise FoldError(f"{name} differs between process {rank} of {self.world} and the first. {remedy}")

    def _fail(self, error: BaseException) -> None:
        if self.world > 1 and self._in_step:
            self._in_step = False
            with suppress(FoldError):  # another one has ended: there is an error of our own already
                gathered(("", f"{type(error).__name__}: {error}", None), self.group, "")


def _is_initialized() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()
