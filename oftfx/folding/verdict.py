"""Whether an adapter arrived in the folded model: one number, one sentence, the same in every form of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from oftfx.errors import warn
from oftfx.folding.measure import Measured
from oftfx.folding.record import SiteFold

ARRIVED, IN_PART = 0.9, 0.5
"""Least share of a green verdict, and of an amber one."""
Measure = Literal["model outputs", "layer outputs", "weights", ""]


@dataclass(frozen=True)
class Verdict:
    """Whether the adapter arrived, by the measure that says most of those that are known.

    Of the *model outputs* on the calibration inputs, ``1 - |y' - y|^2 / |y - y0|^2``: y unfolded, y' folded, y0 without
    adapter; 1 where nothing was lost, 0 where the folded model is no nearer to the adapter's than the base is, negative
    where it is further away. Else of the *layer outputs*, else of the *weights*, the share of the update that was kept:
    ``<F, U> / <U, U>`` over all sites, U the wanted update and F the one that was made; see `SiteFold`.

    Attributes:
        state: ``"green"`` from 90 % on, ``"amber"`` from 50 % on, ``"red"`` below; ``"nothing"`` where there was
            nothing to fold; ``"unknown"`` where nothing that was measured tells.
        measure: ``"model outputs"``, ``"layer outputs"``, ``"weights"``, or ``""`` where there is no share.
        share: what arrived, or None.
        sentence: all that in words.

    Examples:
        >>> import oftfx, torch
        >>> model = oftfx.transform(torch.nn.Sequential(torch.nn.Linear(6, 4)), {"*": oftfx.OFT(3, init="normal")})
        >>> verdict = oftfx.fold(model).report.verdict
        >>> verdict.state, verdict.measure, round(verdict.share, 3)
        ('green', 'weights', 1.0)
        >>> verdict.sentence
        'The adapter arrived: 100.0% of its update is in the weights.'
    """

    state: Literal["green", "amber", "red", "nothing", "unknown"]
    measure: Measure
    share: float | None
    sentence: str

    @property
    def label(self) -> str:
        """The state in words."""
        return _LABELS[self.state]


_LABELS = {
    "green": "The adapter arrived",
    "amber": "The adapter arrived in part",
    "red": "The adapter did not arrive",
    "nothing": "Nothing to fold",
    "unknown": "Not judged",
}
_OF = {
    "model outputs": "of its effect on the model's outputs is kept",
    "layer outputs": "of its update is in the layers' outputs; the whole model's were not measured",
    "weights": "of its update is in the weights",
}


def verdict_of(sites: Sequence[SiteFold], measured: Measured | None, *, rounded_only: bool = False) -> Verdict:
    """The verdict on a fold.

    Args:
        sites: what was done.
        measured: the model's outputs, where they are known.
        rounded_only: no adapter was folded; see `oftfx.quantize`.
    """
    if rounded_only:
        moved = "were not measured" if measured is None else f"moved by {measured.output_error:.2%}"
        return Verdict(
            "unknown", "", None, f"No adapter was folded: {len(sites)} layers were rounded; the outputs {moved}."
        )
    if all(s.action == "untouched" for s in sites):
        why = (
            f"the rotations of all {len(sites)} sites are the identity; was the adapter trained?"
            if sites
            else "no site"
        )
        return Verdict("nothing", "", None, f"Nothing to fold: {why}")
    measure, share = _share(sites, measured)
    if not measure:
        return Verdict(
            "unknown",
            "",
            None,
            "Whether the adapter arrived was not measured: calibrated layers make up for each other's errors, so only "
            "the whole model's outputs tell; `oftfx eval` compares them.",
        )
    if not math.isfinite(share):
        return Verdict("red", measure, None, f"The adapter did not arrive: the {measure} are not finite.")
    state: Literal["green", "amber", "red"]
    shown = round(share, 3)  # the state goes by the number that is read
    state = "green" if shown >= ARRIVED else "amber" if shown >= IN_PART else "red"
    return Verdict(state, measure, share, f"{_LABELS[state]}: {share:.1%} {_OF[measure]}.")


def warn_of(verdict: Verdict) -> None:
    """Let a fold that lost its adapter, or had none to fold, not pass in silence."""
    if verdict.state in ("red", "nothing"):
        warn(f"{verdict.sentence}{_ADVICE if verdict.state == 'red' else ''}")


_ADVICE = " quantized='calibrate' with calibration inputs loses least of what leaves no float behind; 'keep', nothing."


def kept(site: SiteFold) -> float | None:
    """What of a site's update arrived: in the layer's output where that was seen, else in its weight."""
    if site.action == "untouched":
        return None
    return site.survival if site.output_survival is None else site.output_survival


def weight_share(sites: Sequence[SiteFold]) -> float | None:
    """``sum <F, U> / sum <U, U>`` of the weights; None where no weight was to change."""
    return _mean([(s.energy, s.survival) for s in sites if s.action != "untouched"])


def _share(sites: Sequence[SiteFold], measured: Measured | None) -> tuple[Measure, float]:
    if measured is not None and measured.effect:
        return "model outputs", 1.0 - (measured.output_error / measured.effect) ** 2
    if any("calibrated" in s.action for s in sites):
        return "", math.nan
    changed = [s for s in sites if s.action != "untouched"]
    if any(s.output_survival is not None for s in changed):
        share = _mean([(s.energy, s.survival if s.output_survival is None else s.output_survival) for s in changed])
        return "layer outputs", 1.0 if share is None else share
    share = weight_share(sites)
    return "weights", 1.0 if share is None else share


def _mean(weighted: list[tuple[float, float]]) -> float | None:
    if not weighted:
        return None
    whole = sum(energy for energy, _ in weighted)
    return sum(energy * share for energy, share in weighted) / whole if whole else 1.0
