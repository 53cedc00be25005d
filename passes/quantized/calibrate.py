"""Round the rotated weight so that the layer's outputs change least."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn as nn
from torch import Tensor

from oftfx.folding.lockstep import Lockstep
from oftfx.folding.moments import Moments
from oftfx.folding.record import SiteFold
from oftfx.folding.turned import Turned
from oftfx.folding.workbench import Workbench
from oftfx.model.running import Inputs
from oftfx.passes.quantized.policy import QuantizedPolicy, rounded, write_rounded


class Calibrate(QuantizedPolicy):
    """``quantized="calibrate"``: error-compensated rounding by the moments of the layer's real inputs.

    It makes ``|X (W_folded - W')^T|`` small, with ``W' = dequantize(W_q) @ blockdiag(R)^T``; moments are ``X^T X``.

    Without moments (no input reached the layer) the nearest codes are taken, and the report says so.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.formats import format_named
        >>> base = torch.nn.Sequential(format_named("bnb8").make_tiny(66, 10))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> report = oftfx.fold(model, quantized="calibrate", calibration=[(torch.randn(40, 66),)]).report
        >>> [(site.fqn, site.action, site.output_error < 0.01) for site in report]
        [('0', 'calibrated', True)]
    """

    name = "calibrate"
    preserves = "lossy"

    def fold(self, site: Turned, bench: Workbench, moments: Tensor | None, bound: float) -> SiteFold | None:  # noqa: ARG002
        """Round."""
        action = "requantized" if moments is None else "calibrated"
        return write_rounded(site, rounded(site, site.target, moments), action, moments, bound)


def in_running_order(
    model: nn.Module,
    layers: Sequence[nn.Module],
    calibration: Sequence[Inputs],
    fold: Callable[[nn.Module, Tensor | None], None],
) -> None:
    """Fold layers in the order in which the model runs them, each knowing what the ones before it have become.

    Besides the model, memory holds what the forwards of all inputs need to go on from where they wait (their hidden
    states), the moments of one layer, and the fold of one layer; how many layers there are does not matter.

    Args:
        model: runs on the inputs; see `oftfx.folding.lockstep`.
        layers: each is folded once.
        calibration: the inputs.
        fold: gets a layer and its moments; None where no input reached it, or only zeros (an expert that got no
            tokens): every rounding would look perfect.
    """
    if not layers:
        return
    moments = Moments()

    def show(module: nn.Module, inputs: list[Tensor]) -> None:
        seen = moments.of(inputs)
        fold(module, seen if seen.any() else None)

    for module in Lockstep(model, layers).run(calibration, show):
        fold(module, None)
