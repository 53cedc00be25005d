"""What a layer reads on the inputs of several processes, each of which has its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FoldError
from oftfx.folding.peers import Peers
from oftfx.folding.shown import Shown


class Pooled(Shown):
    """`Shown` of the rows of all processes, in the order of their ranks, without the rows themselves.

    Every process has the same numbers to the bit, so that all of them round alike.

    Args:
        width: ``in``.
        tokens: rows in all processes.
        moments: ``X~^T X~`` and ``X~^T (X - X~)`` of all; the second one None where nothing was missed.
        rows: some of ``X~`` and of ``X``, to judge by.
        finite: whether all are finite.
        parts: see `split`.
    """

    _rows: tuple[Tensor, Tensor] | None
    _finite: bool

    def __init__(
        self,
        width: int,
        tokens: int,
        moments: tuple[Tensor, Tensor | None] | None,
        rows: tuple[Tensor, Tensor] | None,
        finite: bool = True,
        parts: tuple[Shown, Shown] | None = None,
    ) -> None:
        super().__init__((), ())
        known: dict[str, object] = {"width": width, "tokens": tokens, "parts": parts, "_rows": rows, "_finite": finite}
        if moments is not None:
            known |= {"seen": moments[0], "missed": moments[1]}
        vars(self).update(known)  # in the places of what is otherwise computed of rows

    @cached_property
    def seen(self) -> Tensor:
        """Of both parts."""
        return self.parts[0].seen + self.parts[1].seen

    @cached_property
    def missed(self) -> Tensor | None:
        """Of both parts."""
        learnt, judged = (part.missed for part in self.parts)
        return None if learnt is None or judged is None else learnt + judged

    def sampled(self, tokens: int, *, own: bool) -> Tensor:  # noqa: ARG002
        """Those that there are."""
        if self._rows is None:
            raise FoldError("nothing is judged by the rows that are learnt from")
        return self._rows[0 if own else 1]

    def is_zero(self) -> bool:
        """Never: what is nothing but zeros is not pooled."""
        return False

    def is_finite(self) -> bool:
        """In all processes."""
        return self._finite

    def split(self, before: int = 0, count: int | None = None, *, alone: bool = True) -> tuple[Shown, Shown]:  # noqa: ARG002
        """As one process with all the inputs would split them."""
        return self.parts


class _Facts(NamedTuple):
    """What a process says first of the rows that a layer reads there."""

    rows: tuple[int, ...]
    width: int
    zero: bool
    finite: bool
    missed: bool


class Pool:
    """`Pooled` of one layer after the other; all processes ask for the same ones.

    Args:
        peers: the processes.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._last: tuple[Shown, _Facts] | None = None
        self._value: Shown | None = None

    @torch.no_grad()
    def of(self, shown: Shown, layer: nn.Module) -> Shown | None:
        """What all processes know of a layer; None where none has read anything but zeros.

        Args:
            shown: what this one has read; where no input of its own came there, nothing.
            layer: tells on which device to compute.
        """
        if self._peers.world == 1:
            return None if shown.is_zero() else shown
        known = self._last is not None and self._last[0] is shown
        facts = self._last[1] if self._last is not None and known else _facts(shown)
        every, known_to = zip(*self._peers.exchange("what a layer reads", (facts, known)), strict=True)
        if not all(known_to):
            self._last = self._value = None  # before the next one is made
            self._last, self._value = (shown, facts), self._pooled(shown, every, layer)
        return self._value

    def _pooled(self, shown: Shown, every: Sequence[_Facts], layer: nn.Module) -> Shown | None:
        if all(f.zero for f in every):
            return None
        peers, width = self._peers, max(f.width for f in every)
        if odd := [rank for rank, f in enumerate(every) if f.rows and f.width != width]:
            raise FoldError(
                f"calibration: process {odd[0]} of {peers.world} has inputs by which a {type(layer).__name__} reads "
                f"{every[odd[0]].width} features, another by which it reads {width}"
            )
        device = shown.inputs[0].device if shown.inputs else _device(layer)
        counts = [len(f.rows) for f in every]
        deep = any(n > 1 for f in every for n in f.rows)
        missed = any(f.missed for f in every)
        learn, judge = shown.split(sum(counts[: peers.rank]), sum(counts), alone=not deep)
        found = list[Tensor | None]()
        for part in (learn, judge):
            found += [part.seen if part.inputs else None, *([part.missed if part.inputs else None] if missed else [])]
        square = (torch.zeros(width, width, device=device) if t is None else t for t in found)
        totals = peers.add("moments", [*square])
        del found
        tokens = [int(n) for n in peers.sums("tokens", [s.tokens for s in (learn, judge, shown)])]
        parts: list[Shown] = []
        for part, count in zip((learn, judge), tokens, strict=False):
            mine = totals.pop(0), totals.pop(0) if missed else None
            parts.append(Pooled(width, count, mine, self._rows(part, count, device) if part is judge else None))
        finite = all(f.finite for f in every)
        return Pooled(width, tokens[2], None, self._rows(shown, tokens[2], device), finite, (parts[0], parts[1]))

    def _rows(self, part: Shown, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        mine = [part.sampled(tokens, own=own).cpu() for own in (True, False)] if part.inputs else None
        every = [f for f in self._peers.exchange("rows", mine) if f is not None]
        own, unfolded = (torch.cat(column).to(device) for column in zip(*every, strict=True))
        return own, unfolded


def _facts(shown: Shown) -> _Facts:
    rows = tuple(x.numel() // x.shape[-1] for x in shown.inputs)
    if not rows:
        return _Facts(rows, 0, zero=True, finite=True, missed=False)
    pairs = zip(shown.inputs, shown.unfolded, strict=True)
    missed = any(y is not None and not torch.equal(x, y) for x, y in pairs)
    return _Facts(rows, shown.width, shown.is_zero(), shown.is_finite(), missed)


def _device(layer: nn.Module) -> torch.device:
    found = next((t for t in (*layer.parameters(), *layer.buffers())), None)
    return torch.device("cpu") if found is None else found.device
