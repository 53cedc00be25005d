"""Rows of a batch with adapters of their own: which acts on which, in the call that runs now.

What acts is a property of the calls inside a ``with``, in one thread, so it is kept in a context variable and in no
module. `OPEN` only says whether there is any such ``with`` at all: it costs a site nothing else to know, and compiled
code, which knows nothing of context variables, is compiled again when it changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import AdapterError
from oftfx.placement.find import rotated_sites
from oftfx.placement.open import OPEN, opened
from oftfx.placement.torch_private import never_compiled_alone

if TYPE_CHECKING:
    from oftfx.placement.base import Placement

G = TypeVar("G")
Chain = tuple[str, ...]
"""Names of adapters in the order in which they act; none for the base."""

_ROWS: ContextVar[tuple[Rows, ...]] = ContextVar("oftfx_rows", default=())


class Rows:
    """The adapters of each row of a batch, for the placements of one model.

    Args:
        placements: of the model.
        chains: what acts on each row; None where the adapters of the model act on all, as outside.

    Attributes:
        ran: whether any site has asked for them.
    """

    def __init__(self, placements: Sequence[Placement], chains: Sequence[Chain] | None) -> None:
        self.placements = frozenset(placements)
        self.chains = None if chains is None else tuple(chains)
        self.ran = False
        self._here: dict[Placement, dict[Chain, list[int]]] = {}

    def groups(self, placement: Placement) -> dict[Chain, list[int]]:
        """At a site, what acts there on which rows; adapters without a rotation there do nothing."""
        self.ran = True
        found = self._here.get(placement)
        if found is None:
            found = self._here[placement] = {}
            for row, chain in enumerate(self.chains or ()):
                found.setdefault(tuple(n for n in chain if n in placement.rotations), []).append(row)
        return found

    def rotate(self, placement: Placement, x: Tensor, axis: int = -1) -> Tensor:
        """Rotate the rows of ``x`` group by group; rows of the base are what they were, bit for bit.

        Raises:
            AdapterError: dimension 0 of ``x`` is not the rows.
        """
        groups = self.groups(placement)
        check_eager(placement.site)
        if list(groups) != [()]:
            self.check(placement, x, x.dim() + axis > 0)
        return by_group(groups, x, lambda part, chain: placement.alone(part, chain))

    def check(self, placement: Placement, x: Tensor, batched: bool) -> None:
        """Refuse a tensor whose dimension 0 is not the rows."""
        count = len(self.chains or ())
        if x.is_nested or not batched or x.shape[0] != count:
            shape = "a nested tensor" if x.is_nested else tuple(x.shape)
            raise AdapterError(
                f"{placement.site}: adapter_rows names {count} rows, so dimension 0 of what this site reads has to be "
                f"the batch, of size {count}; got {shape}. If the model reads all rows' tokens as one row here, or "
                "puts another dimension first, use one adapter a call"
            )


def by_group(groups: Mapping[G, Sequence[int]], x: Tensor, run: Callable[[Tensor, G], Tensor]) -> Tensor:
    """``run`` on the rows of each group, the results in the order of the rows."""
    if len(groups) == 1:
        return run(x, next(iter(groups)))
    parts = [run(x.index_select(0, index_of(rows, x)), group) for group, rows in groups.items()]
    order = [row for rows in groups.values() for row in rows]
    back = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(parts).index_select(0, index_of(back, x))


def is_innermost(rows: Rows) -> bool:
    """Whether the call that runs now has these rows, and no others of the same model inside."""
    return next((r for r in reversed(_ROWS.get()) if r.placements & rows.placements), None) is rows


def rows_of(placement: Placement) -> Rows | None:
    """The rows that the call which runs now has at a site; None where the adapters of the model act on all."""
    for rows in reversed(_ROWS.get()):
        if placement in rows.placements:
            return None if rows.chains is None else rows
    return None


@contextmanager
def with_rows(rows: Rows) -> Iterator[None]:
    """Let these rows have their adapters in the calls inside, in this thread."""
    with opened(OPEN, _ROWS, (*_ROWS.get(), rows)):
        yield


def check_no_rows(model: nn.Module, what: str) -> None:
    """Refuse what cannot be done inside `oftfx.adapter_rows` of the same model.

    Raises:
        AdapterError: this is such a call.
    """
    if OPEN.any and any(rows_of(p) is not None for _, p in rotated_sites(model)):
        raise AdapterError(f"{what} inside adapter_rows of the same model: leave the 'with' first")


@never_compiled_alone
def check_eager(where: str) -> None:
    """Refuse a call that becomes, or is part of, something which is run again without these rows."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        raise AdapterError(
            f"{where}: inside adapter_rows the model cannot be compiled, exported or traced: which adapter a "
            "row has is no part of a program. Call the model itself"
        )
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith("checkpoint.py") and frame.f_globals.get("__name__") == _CHECKPOINT:
            raise AdapterError(
                f"{where}: gradient checkpointing runs this layer again in backward, outside of adapter_rows, "
                "where its rows have no adapters of their own; switch it off (model.gradient_checkpointing_disable())"
            )
        frame = frame.f_back  # type: ignore[assignment]


_CHECKPOINT = "torch.utils.checkpoint"


def index_of(rows: Sequence[int], x: Tensor) -> Tensor:
    """Numbers of rows, where ``x`` is."""
    return torch.tensor(rows, device=x.device)
