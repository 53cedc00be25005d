"""Round experts one by one, each for the rows that it alone reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.nn as nn
from torch import Tensor

from oftfx.errors import warn
from oftfx.folding.expert_rows import rows_of_experts
from oftfx.folding.policies import Budget
from oftfx.folding.record import SiteFold
from oftfx.folding.shown import Shown
from oftfx.folding.turned import Turned
from oftfx.formats.base import WeightState
from oftfx.formats.experts import Apart, ExpertLayer, ExpertsFormat, OneExpert
from oftfx.grids import Codes
from oftfx.passes.quantized.policy import check_finite_inputs, rounded, write_rounded
from oftfx.passes.quantized.roundings import Judged, are_few, best_rounding

CROSSING = "its groups of weights are of several experts or rows, so they are rounded to the nearest codes"
UNSEEN = "what each expert reads cannot be seen from outside, so its weights are rounded to the nearest codes"


@dataclass(frozen=True, eq=False)
class _Expert:
    """One expert as what is rounded."""

    module: nn.Module
    base: Tensor
    target: Tensor
    format: OneExpert


def calibrated_experts(site: Turned, shown: Shown, bound: Budget | None) -> SiteFold | None:
    """Round all experts of a parameter; None, and the old weight again, where that is not good enough.

    Args:
        site: the parameter.
        shown: what the layer reads, with its calls.
        bound: what is good enough; None: anything.
    """
    weight_format = site.format
    apart, rows = None, None
    if isinstance(weight_format, ExpertsFormat):
        apart = weight_format.apart(site.module)
    if apart is not None:
        axis = 2 if site.layout.stored == "experts" else 1
        rows = rows_of_experts(site.module, (site.placement.parameter, axis), shown)
    if not isinstance(weight_format, ExpertsFormat) or apart is None or rows is None:
        why = CROSSING if apart is None else UNSEEN
        warn(f"{site.fqn}: {why}")
        done = write_rounded(site, rounded(site, site.target, None), "requantized", None, bound)
        return None if done is None else replace(done, note="; ".join(n for n in (done.note, why) if n))
    state, judged = _rounded(site, weight_format, apart, rows)
    done = write_rounded(site, state, "calibrated", None, bound, judged=judged)
    if done is None:
        return None
    reached = [r for r in rows if r is not None]
    few = [r for r in reached if are_few(r)]
    notes = [done.note]
    if few:
        notes.append(f"{len(few)} of {len(rows)} experts have read few tokens for {few[0].width} input features")
    if missed := len(rows) - len(reached):
        one = missed == 1
        verb = "was reached by no calibration input and is" if one else "were reached by no calibration input and are"
        notes.append(f"{missed} of {len(rows)} experts {verb} rounded to the nearest codes")
        warn(f"{site.fqn}: {notes[-1]}")
    tokens = sum(r.tokens for r in reached)
    return replace(done, tokens=tokens, few_tokens=bool(few), note="; ".join(n for n in notes if n))


def _rounded(
    site: Turned, weight_format: ExpertsFormat, apart: Apart, rows: Sequence[Shown | None]
) -> tuple[WeightState, Judged]:
    """The parameter with every expert rounded, and how it does on the inputs that were held out."""
    one, coded, judges = OneExpert(), [], []
    bases = weight_format.each(site.base, site.module).contiguous()
    targets = weight_format.each(site.target, site.module).contiguous()
    experts = [
        _Expert(ExpertLayer(apart.grid, codes), base.float(), target.float(), one)
        for codes, base, target in zip(apart.codes, bases, targets, strict=True)
    ]
    for expert, shown in zip(experts, rows, strict=True):
        if shown is None:
            state, judge = rounded(expert, expert.target, None), None
        else:
            check_finite_inputs(site, shown)
            best = best_rounding(expert, shown)
            state, judge = best.state, best.judge
        coded.append(state["coded"])
        judges.append(judge)
    state = weight_format.together(coded, site.module)
    judged = Judged()
    for expert, codes, judge in zip(experts, _apart(weight_format, site, state), judges, strict=True):
        if judge is not None:  # by the codes as they are stored: scales may have been coupled
            judged += Judged.of(expert, {"coded": codes}, judge)
    return state, judged


def _apart(weight_format: ExpertsFormat, site: Turned, state: WeightState) -> list[Codes]:
    old = weight_format.read(site.module)
    weight_format.write(site.module, state)
    try:
        found = weight_format.apart(site.module)
    finally:
        weight_format.write(site.module, old)
    assert found is not None  # it was before
    return found.codes
