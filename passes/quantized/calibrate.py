"""Round the rotated weight so that the layer's outputs change least."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
import torch.nn as nn

from oftfx.folding.lockstep import Lockstep
from oftfx.folding.peers import Peers
from oftfx.folding.policies import Budget
from oftfx.folding.pooled import Pool
from oftfx.folding.record import SiteFold
from oftfx.folding.shown import ExpertCalls, Showing, Shown
from oftfx.folding.spill import Spill
from oftfx.folding.turned import Turned
from oftfx.folding.workbench import Workbench
from oftfx.formats.base import WeightFormat
from oftfx.model.running import Inputs
from oftfx.passes.quantized.calibrate_experts import calibrated_experts
from oftfx.passes.quantized.policy import QuantizedPolicy, check_finite_inputs, rounded, write_rounded
from oftfx.passes.quantized.roundings import are_few, best_rounding
from oftfx.placement.find import placements_on

NOT_REACHED = "no calibration input reached this layer, or only zeros, so its weights are rounded to the nearest codes"


class Calibrate(QuantizedPolicy):
    """``quantized="calibrate"``: error-compensated rounding by the layer's real inputs.

    It makes ``|X~ W_folded^T - X W'^T|`` small, with ``W' = dequantize(W_q) @ blockdiag(R)^T``, X what the layer reads
    in the unfolded model and X~ what it reads now that the layers before it are folded: so it makes up for part of
    their errors. How much it believes the inputs, and whether it does better to round to the nearest codes or to keep
    the old ones, is judged on a quarter of them that it has not learnt from.

    Without inputs (none reached the layer) the nearest codes are taken, and the report says so. Experts are rounded one
    by one, each for the rows that it reads.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.formats import format_named
        >>> base = torch.nn.Sequential(format_named("bnb8").make_tiny(66, 10))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> report = oftfx.fold(model, quantized="calibrate", calibration=[(torch.randn(400, 66),)]).report
        >>> [(site.fqn, site.action, site.output_error < 0.01) for site in report]
        [('0', 'calibrated', True)]
    """

    name = "calibrate"
    preserves = "lossy"

    def fold(self, site: Turned, bench: Workbench, shown: Shown | None, bound: Budget | None) -> SiteFold | None:  # noqa: ARG002
        """Round; the experts of a parameter one by one."""
        if shown is None:
            return write_rounded(site, rounded(site, site.target, None), "requantized", None, bound)
        if shown.experts is not None:
            return calibrated_experts(site, shown, bound)
        check_finite_inputs(site, shown)
        best = best_rounding(site, shown)
        done = write_rounded(site, best.state, "calibrated", None, bound, judged=best.judged)
        if done is None:
            return None
        few = are_few(shown)
        tokens = f"{shown.tokens} tokens for {shown.width} input features are few" if few else ""
        note = "; ".join(n for n in (done.note, tokens, best.remark) if n)
        return replace(done, tokens=shown.tokens, few_tokens=few, note=note)


def in_running_order(
    model: nn.Module,
    layers: Sequence[nn.Module],
    calibration: Sequence[Inputs],
    fold: Callable[[nn.Module, Shown | None], None],
    unfolded: tuple[nn.Module, Sequence[nn.Module]] | None = None,
    leave: Callable[[nn.Module, nn.Module | None], None] | None = None,
    spill: Spill | None = None,
    experts: Collection[nn.Module] = (),
    peers: Peers | None = None,
) -> None:
    """Fold layers in the order in which the model runs them, each knowing what the ones before it have become.

    Besides the model, memory holds what the forwards of all inputs need to go on from where they wait (their hidden
    states; of the unfolded model as well), some matrices ``(in, in)`` of one layer, and the fold of one layer; how many
    layers there are does not matter.

    Args:
        model: runs on the inputs; see `oftfx.folding.lockstep`.
        layers: each is folded once.
        calibration: the inputs.
        fold: gets a layer and its inputs; None where none reached it, or only zeros (an expert that got no tokens):
            every rounding would look perfect.
        unfolded: a model of the same weights that runs beside, and its layers, one for each.
        spill: where the hidden states are kept; None: in memory.
        leave: gets a layer that all forwards have left, and the one of the unfolded model. That can be given the folded
            weight as well, so that the old one need not be kept for it.
        experts: layers that hand rows on to experts of theirs: `Shown.experts` says how they were called.
        peers: processes that fold the same layers, each with inputs of its own; what these show is put together.
    """
    if not layers:
        return
    showing, left = Showing() if spill is None else Showing(spill.forget), list[nn.Module]()
    fellows = {} if unfolded is None else dict(zip(layers, unfolded[1], strict=True))
    peers = peers or Peers()
    pool, lockstep = Pool(peers), Lockstep(model, layers, unfolded, spill, peers)

    def show(module: nn.Module, inputs: list[torch.Tensor], others: list[torch.Tensor | None]) -> None:
        while left:
            module_left = left.pop()
            if leave is not None:
                leave(module_left, fellows.get(module_left))
        shown = showing.of(inputs, others)
        if module in experts:
            shown = replace(shown, experts=ExpertCalls(lockstep.calls, fellows.get(module)))
        fold(module, pool.of(shown, module))
        left.append(module)

    for module in lockstep.run(calibration, show):
        fold(module, None)


def give_folded(formats: Sequence[WeightFormat], module: nn.Module, fellow: nn.Module | None) -> None:
    """Let a layer of the unfolded model, which all forwards have left, have the weight of the folded one."""
    if fellow is None:
        return
    drop_rotations(fellow)
    for weight_format in (f for f in formats if f.matches(module)):
        state = weight_format.read(module)
        weight_format.write(fellow, state)
        weight_format.own(fellow)
        weight_format.write(module, state)  # some weights know their layer


def drop_rotations(module: nn.Module) -> None:
    """Take every rotation off a layer, with what it has kept: who set the modes keeps every module until the end."""
    for placement in placements_on(module):
        for rotation in placement.rotations.values():
            rotation.forget()
        placement.drop()
