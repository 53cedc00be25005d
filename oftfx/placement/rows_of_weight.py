"""Rows with adapters of their own where the weight is rotated: the layer runs once more for each group of rows."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch.nn as nn
from torch import Tensor

from oftfx.errors import AdapterError
from oftfx.placement.rows import Chain, Rows, by_group, check_eager, index_of, with_rows

if TYPE_CHECKING:
    from oftfx.placement.base import Placement


def chain_of_call(rows: Rows, placement: Placement) -> Chain:
    """What acts in the call that begins: what all rows have, or nothing, and `output_by_rows` does the rest.

    Raises:
        AdapterError: the rows differ, and the weight's reader cannot be run for some of them.
    """
    groups = rows.groups(placement)
    check_eager(placement.site)
    if len(groups) == 1:
        return next(iter(groups))
    reader = placement.reader
    if reader is not placement.module or len(inspect.signature(reader.forward).parameters) != 1:
        raise AdapterError(
            f"{placement.site}: the forward of {type(reader).__name__} reads this weight and more than one tensor, so "
            "it cannot be run for some rows of a batch; use one adapter a call, or leave this site out of the adapters"
        )
    return ()


def output_by_rows(rows: Rows, placement: Placement, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """The output with the rows of each group as its adapters make them; None where one call was right for all."""
    groups = rows.groups(placement)
    if len(groups) == 1:
        return None
    if len(args) != 1:
        raise AdapterError(f"{placement.site}: inside adapter_rows, give this layer its input by position")
    (x,) = args
    rows.check(placement, x, x.dim() > _dimensions_of_a_row(placement.module))

    def run(part: Tensor, chain: Chain) -> Tensor:
        if not chain:
            return output.index_select(0, index_of(groups[chain], output))
        with with_rows(Rows([placement], [chain] * part.shape[0])):
            return placement.module(part)

    return by_group(groups, x, run)


def _dimensions_of_a_row(module: nn.Module) -> int:
    """How many axes the layer itself needs."""
    return 1 + len(getattr(module, "kernel_size", ()))
