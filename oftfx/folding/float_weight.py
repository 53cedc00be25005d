"""Put a rotation into a float weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FoldError
from oftfx.folding.angles import angles_of
from oftfx.folding.probe import has_own_forward, probe
from oftfx.folding.record import SiteFold
from oftfx.folding.turned import is_identity, share, untouched
from oftfx.folding.workbench import Workbench
from oftfx.formats.base import WeightFormat
from oftfx.model.huggingface import untie
from oftfx.placement.base import Placement
from oftfx.placement.frozen import product_of
from oftfx.precision import BOUNDS, relative_error

_NOT_PROBED = "its class has a forward of its own that could not be tried alone; compare folded and unfolded outputs"


@torch.no_grad()
def fold_float(
    fqn: str, placement: Placement, weight_format: WeightFormat, bench: Workbench, chain: list[Tensor] | None = None
) -> SiteFold:
    """Write the rotated weight where the float one was, rounded once; one pass over memory.

    Args:
        fqn: path of the site.
        placement: its rotations.
        weight_format: how it is stored.
        bench: what the folds of this model share.
        chain: blocks of what acts there, where they have been made already.

    Raises:
        FoldError: the layer does not compute ``x @ W^T``, the rotated weight is not finite, or overflows its dtype.
    """
    module, chain = placement.module, product_of(placement.in_effect()) if chain is None else chain
    if all(map(is_identity, chain)):
        return untouched(fqn, placement, weight_format)
    notes, before = [bench.remark(placement)], weight_format.nbytes(module)
    matrix, sums = _turned(weight_format, module, chain)
    side = weight_format.layout(module).side
    if not math.isfinite(sums.update):
        raise FoldError(f"{fqn}: the rotated weight is not finite; look at the adapter's values there")
    if not math.isfinite(sums.error):
        raise FoldError(f"{fqn}: the rotated weight overflows {matrix.dtype}; fold in a wider dtype")
    tried = placement.format is None and has_own_forward(module)
    probed = probe(module) if tried else None
    weight_format.write(module, weight_format.take(matrix, module))
    placement.drop()
    if probed is not None:
        _check_probe(fqn, module, *probed)
    path = bench.paths[module]
    untied = untie(bench.model, f"{path}.{placement.parameter}" if path else placement.parameter)
    if untied is not None:
        bench.journal.note(untied)
    notes += [_NOT_PROBED] if tried and probed is None else []
    angle, typical = angles_of(chain)
    return SiteFold(
        fqn,
        weight_format.name,
        "folded",
        update=sums.update,
        energy=sums.moved,
        relative_error=sums.error,
        survival=sums.survival,
        bytes_before=before,
        bytes_after=weight_format.nbytes(module),
        note="; ".join(n for n in notes if n),
        angle=angle,
        typical_angle=typical,
        side=side,
    )


def no_rows(fqn: str, placement: Placement, weight_format: WeightFormat, chain: list[Tensor]) -> SiteFold:
    """The line of a site whose rows are all in other processes; the rotation goes here as well."""
    placement.drop()
    return SiteFold(fqn, weight_format.name, "untouched" if all(map(is_identity, chain)) else "folded")


@dataclass(frozen=True)
class _Sums:
    """Squared norms: of the update, of the weight before, of what rounding misses, of the target; and what arrived."""

    moved: float
    whole: float
    missed: float
    wanted: float
    kept: float

    @property
    def update(self) -> float:
        return share(math.sqrt(self.moved), math.sqrt(self.whole))

    @property
    def error(self) -> float:
        return share(math.sqrt(self.missed), math.sqrt(self.wanted))

    @property
    def survival(self) -> float:
        return self.kept / self.moved if self.moved > 0 else 1.0


def _turned(weight_format: WeightFormat, module: nn.Module, chain: list[Tensor]) -> tuple[Tensor, _Sums]:
    """The rotated weight as matrix, in the dtype of the weight; some rows at a time, which stay in a CPU's cache."""
    layout, dtype = weight_format.layout(module), weight_format.dtype(module)
    matrix, sums = torch.empty(0), list[Tensor]()
    for rows, base in weight_format.rows(module):
        if not sums:
            matrix = base.new_empty(weight_format.shape(module), dtype=dtype)
            chain = [b.to(base.device) for b in chain]
        folded = matrix[rows]
        target = layout.turned_now(base, chain, out=folded if dtype == base.dtype else None)
        if target is not folded:
            folded.copy_(target)
        sums.append(_squares(base, target, None if target is folded else folded))
    return matrix, _Sums(*torch.stack(sums).sum(0).tolist())


def _squares(base: Tensor, target: Tensor, folded: Tensor | None) -> Tensor:
    """Those of `_Sums`, float64; ``folded`` is None where nothing was rounded."""
    asked = target - base
    moved, whole = (torch.linalg.vector_norm(t).double().square() for t in (asked, base))
    if folded is None:
        return torch.stack([moved, whole, torch.zeros_like(moved), whole, moved])
    wide = folded.to(target.dtype)
    kept, wanted = torch.sum((wide - base) * asked).double(), torch.linalg.vector_norm(target).double().square()
    return torch.stack([moved, whole, torch.linalg.vector_norm(wide.sub_(target)).double().square(), wanted, kept])


def _check_probe(fqn: str, module: nn.Module, x: Tensor, expected: Tensor) -> None:
    error = relative_error(module(x), expected)
    if not error <= BOUNDS[expected.dtype]:
        raise FoldError(
            f"{fqn}: a {type(module).__name__} has a forward of its own that does not compute x @ W^T: folded and "
            f"unfolded differ by a relative {error:.2g}. Exclude it by a rule, or leave the model unfolded"
        )
