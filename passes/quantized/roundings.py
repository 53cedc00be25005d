"""Ways to round one layer, and which of them is best on inputs that it was not made from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oftfx.folding.shown import Regular, Shown
from oftfx.formats.base import WeightState
from oftfx.passes.quantized.judged import Judged, Rounding, values_of
from oftfx.passes.quantized.policy import rounded

_RICH, _FEW, _MEAGRE = 4, 2, 0.5  # tokens for each input feature
_CLEARLY = 0.75
"""Of the error: held-out tokens of the same few texts are like those that were learnt from, and flatter by a quarter.
SmolLM2 in NF4 by 128 tokens: without this 13 of 120 layers were up to 27 % worse than nearest rounding elsewhere."""


@dataclass(frozen=True)
class Way:
    """How to round.

    Attributes:
        regular: how far the moments are believed; None: the nearest codes, or with ``keep`` those that are there.
        share: of the correction for what earlier folds have missed.
        keep: leave the codes as they are.
    """

    regular: Regular | None = None
    share: float = 0.0
    keep: bool = False

    def state(self, site: Rounding, shown: Shown) -> WeightState:
        """The rounded weight."""
        if self.keep:
            return site.format.read(site.module)
        if self.regular is None:
            return rounded(site, site.target, None)
        moments = shown.moments(self.regular)
        return rounded(site, shown.corrected(site.target, moments, self.share), moments)


NEAREST, KEEP = Way(), Way(keep=True)
CALIBRATED = Way("as seen", 1.0)
DIAGONAL = Way("diagonal")
_CAREFUL = (Way("as seen", 0.5), Way("damped", 0.5), Way("shrunk", 0.5), Way("shrunk"), DIAGONAL)


@dataclass(frozen=True)
class Best:
    """The rounding that was chosen.

    Attributes:
        way: how it was made.
        state: the weight.
        judge: the inputs that it was judged by.
        judged: how it did.
    """

    way: Way
    state: WeightState
    judge: Shown
    judged: Judged

    @property
    def remark(self) -> str:
        """What a user should know of it."""
        if self.way.keep:
            return "keeps its old codes, which were best on held-out inputs"
        if self.way.regular is None:
            return "rounded to the nearest codes, which were best on held-out inputs"
        return ""


def are_few(shown: Shown) -> bool:
    """Whether a layer has read too little for much to be known of what it reads."""
    return shown.tokens < _FEW * shown.width


def best_rounding(site: Rounding, shown: Shown) -> Best:
    """Try the ways on part of the inputs and judge them on the rest.

    Nearest rounding, or the old codes where they are better, is what another way has to beat by more than the standard
    error of the difference. Where there are plenty of inputs, only one other way is tried and taken as it is; else
    several are, and the best is made anew from all. Where there are hardly any, what believes in correlations has to be
    better by a quarter; else scales are only searched by the size of the inputs.
    """
    rich = shown.tokens >= _RICH * shown.width
    learn, judge = shown.parts if rich else shown.split()  # few are quickly looked at again by layers that share them
    ways = (CALIBRATED,) if rich else (CALIBRATED, *_CAREFUL)
    wanted = judge.outputs(site.target)
    if rich:
        safe = min((_tried(site, way, learn, judge, wanted) for way in (NEAREST, KEEP)), key=lambda t: t.error)
    else:  # they are made from no inputs, so all can judge them
        every = shown.outputs(site.target)
        safe_way = min((NEAREST, KEEP), key=lambda way: _tried(site, way, shown, shown, every).error)
        safe = _tried(site, safe_way, learn, judge, wanted)
    tried = (_tried(site, way, learn, judge, wanted) for way in ways)
    if shown.tokens < _MEAGRE * shown.width:
        tried = (t for t in tried if t.way == DIAGONAL or t.error < _CLEARLY**2 * safe.error)
    best = min(tried, key=lambda t: t.error)
    gain = safe.errors - best.errors
    if not float(gain.mean()) > float(gain.std(correction=0)) / len(gain) ** 0.5:
        best = safe
    del wanted
    judged = Judged.of(site, best.state, judge)
    del learn
    state = best.state if rich or best is safe else best.way.state(site, shown)
    return Best(best.way, state, judge, judged)


@dataclass(frozen=True, eq=False)
class _Tried:
    way: Way
    state: WeightState
    errors: Tensor  # squared, of each row

    @property
    def error(self) -> float:
        return float(self.errors.sum(dtype=torch.float64))


def _tried(site: Rounding, way: Way, learn: Shown, judge: Shown, wanted: Tensor) -> _Tried:
    state = way.state(site, learn)
    return _Tried(way, state, (judge.outputs(values_of(site, state), own=True) - wanted).square_().sum(1))
