"""What the policies for quantized weights have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from oftfx.errors import FoldError
from oftfx.folding.journal import Journal
from oftfx.folding.policies import Budget
from oftfx.folding.record import Folds, SiteFold
from oftfx.folding.shown import Shown
from oftfx.folding.turned import Turned, untouched
from oftfx.folding.workbench import Workbench
from oftfx.formats.base import WeightState
from oftfx.passes.protocol import Change, Pass, PassResult
from oftfx.passes.quantized.judged import Judged, Rounding
from oftfx.placement.find import rotated_sites
from oftfx.planning.program import Program
from oftfx.rotation.ieee import ieee_products


class QuantizedPolicy(Pass):
    """One way to fold a rotation into, or to leave it in front of, a quantized weight.

    By itself a policy is a pass that treats every quantized site so. `FoldRotations` asks it site by site.
    """

    after = ("insert_rotations",)

    @abstractmethod
    def fold(self, site: Turned, bench: Workbench, shown: Shown | None, bound: Budget | None) -> SiteFold | None:
        """Fold one site; None, and nothing changed, where it would not be good enough.

        Args:
            site: the weight and what its rotations make of it.
            bench: what the folds of this model share.
            shown: what the layer reads, where calibration inputs have shown it.
            bound: what is good enough; None: anything.

        Raises:
            FoldError: the result is not finite.
        """

    @torch.no_grad()
    def fold_all(self, program: Program, shown: Shown | None = None) -> list[SiteFold]:
        """Treat every quantized site; float ones stay rotated.

        Args:
            program: of the model.
            shown: what its one quantized layer reads, where that is known.
        """
        bench, lines = Workbench(program.index, Journal(keep=False)), list[SiteFold]()
        for fqn, placement in list(rotated_sites(program.index)):
            weight_format = placement.weight_format()
            if weight_format is None or weight_format.lossless:
                continue
            with ieee_products():
                site = Turned.of(fqn, placement, weight_format, bench.remark(placement))
                if site is None:
                    lines.append(untouched(fqn, placement, weight_format))
                elif (done := self.fold(site, bench, shown, None)) is not None:
                    lines.append(done)
            bench.finish()
        return lines

    def run(self, program: Program) -> PassResult:
        """Treat every quantized site; float ones stay rotated."""
        lines = self.fold_all(program)
        changes = tuple(Change(s.fqn, s.action, s.note) for s in lines)
        return PassResult(program.renewed(), bool(lines), changes, Folds(tuple(lines)))


def write_rounded(
    site: Turned,
    state: WeightState,
    action: str,
    shown: Shown | None,
    bound: Budget | None,
    *,
    judged: Judged | None = None,
) -> SiteFold | None:
    """Write a weight on its format's grid and measure it; None, and the old one again, where it is not good enough.

    Args:
        site: the weight.
        state: what it becomes.
        action: for the report.
        shown: inputs to measure the layer's outputs on.
        bound: what is good enough; None: anything.
        judged: the outputs, where they have been measured already.
    """
    module, weight_format = site.module, site.format
    old = weight_format.read(module)
    weight_format.write(module, state)
    got = site.arrived(weight_format, module, None if shown is None else shown.seen)
    if judged is not None:
        got = replace(got, output_error=judged.error, output_survival=judged.survival)
    if bound is not None and not bound.allows(got):
        weight_format.write(module, old)
        return None
    site.placement.drop()
    site.check_finite(got, weight_format.dtype(module))
    return site.line(action, weight_format.nbytes(module), got)


def rounded(site: Rounding, wanted: Tensor, moments: Tensor | None) -> WeightState:
    """``wanted`` on the grid of the site's format: the nearest codes, or with ``moments`` error-compensated ones."""
    if moments is None:
        return site.format.requantize(wanted, site.module)
    return site.format.calibrate(wanted, site.module, moments)


def check_finite_inputs(site: Turned, shown: Shown) -> None:
    """Refuse to learn from inputs that are not finite.

    Raises:
        FoldError: they are not.
    """
    if not shown.is_finite():
        raise FoldError(
            f"{site.fqn}: the layer's inputs are not finite on the calibration data; look for the first NaN"
        )
