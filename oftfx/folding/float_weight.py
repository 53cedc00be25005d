"""Put a rotation into a float weight."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FoldError
from oftfx.folding.arrived import Arrived
from oftfx.folding.probe import has_own_forward, probe
from oftfx.folding.record import SiteFold
from oftfx.folding.turned import Turned
from oftfx.folding.workbench import Workbench
from oftfx.model.huggingface import untie
from oftfx.precision import BOUNDS, relative_error

_NOT_PROBED = "its class has a forward of its own that could not be tried alone; compare folded and unfolded outputs"


@torch.no_grad()
def fold_float(site: Turned, bench: Workbench) -> SiteFold:
    """Write the rotated weight where the float one was, rounded once.

    Raises:
        FoldError: the layer does not compute ``x @ W^T``, or the result overflows its dtype.
    """
    module, placement, weight_format = site.module, site.placement, site.format
    tried = placement.format is None and has_own_forward(module)
    probed = probe(module) if tried else None
    weight_format.write(module, weight_format.take(site.target, module))
    placement.drop()
    if probed is not None:
        _check_probe(site.fqn, module, *probed)
    path = bench.paths[module]
    untied = untie(bench.model, f"{path}.{placement.parameter}" if path else placement.parameter)
    if untied is not None:
        bench.journal.note(untied)
    note = "; ".join(n for n in (site.note, _NOT_PROBED if tried and probed is None else "") if n)
    rounds = weight_format.dtype(module) != site.target.dtype
    got = site.arrived(weight_format, module) if rounds else Arrived()
    site.check_finite(got, weight_format.dtype(module))
    return site.line("folded", weight_format.nbytes(module), got, note=note)


def _check_probe(fqn: str, module: nn.Module, x: Tensor, expected: Tensor) -> None:
    error = relative_error(module(x), expected)
    if not error <= BOUNDS[expected.dtype]:
        raise FoldError(
            f"{fqn}: a {type(module).__name__} has a forward of its own that does not compute x @ W^T: folded and "
            f"unfolded differ by a relative {error:.2g}. Exclude it by a rule, or leave the model unfolded"
        )
