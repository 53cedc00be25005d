"""Write what fold-aware training has computed with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from oftfx.errors import FoldError
from oftfx.folding.policies import Budget
from oftfx.folding.record import SiteFold
from oftfx.folding.shown import Shown
from oftfx.folding.turned import Turned, norm, share
from oftfx.folding.workbench import Workbench
from oftfx.passes.quantized.policy import QuantizedPolicy, write_rounded
from oftfx.precision import pieces


class AsTrained(QuantizedPolicy):
    """The codes and scales of the last fold-aware forward, to the bit; see `oftfx.fold_aware`.

    The errors of its lines are those against what was trained; how far the rotated weight is away, is in the note.

    Args:
        distilled: lines of a calibrated fold, for sites whose scales were distilled from it; their errors are those
            against the rotated weight.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.formats import format_named
        >>> base = torch.nn.Sequential(format_named("bnb8").make_tiny(66, 10))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> with oftfx.fold_aware(model, "requantize"):
        ...     report = oftfx.fold(model).report
        >>> [(site.fqn, site.action, site.relative_error) for site in report]
        [('0', 'as trained', 0.0)]
    """

    name = "as_trained"
    preserves = "lossy"  # against the rotations; exact against what was trained

    def __init__(self, distilled: Mapping[str, SiteFold] | None = None) -> None:
        self.distilled = distilled or {}

    def fold(self, site: Turned, bench: Workbench, shown: Shown | None, bound: Budget | None) -> SiteFold | None:  # noqa: ARG002
        """Pack them."""
        return self.line(site, bench)

    def line(self, site: Turned, bench: Workbench) -> SiteFold:  # noqa: ARG002
        """The same; never over any bound."""
        aware = site.placement.fold_in_effect()
        if aware is None:
            raise FoldError(f"{site.fqn}: nothing was trained through a fold here; see oftfx.fold_aware")
        coded = aware.coded()
        state = aware.format.pack(coded, site.module)
        before = self.distilled.get(site.fqn)
        if before is not None:
            done = write_rounded(site, state, f"{before.action}, distilled", None, None)
        else:
            trained = aware.values(coded)
            away = share(norm(t - f for t, f in pieces(site.target, trained)), norm(t for (t,) in pieces(site.target)))
            note = f"trained through {aware.how!r}, {away:.2%} from the rotated weight"
            site = replace(site, target=trained, note="; ".join(n for n in (note, site.note) if n))
            done = write_rounded(site, state, "as trained", None, None)
        if done is None:
            raise FoldError(f"{site.fqn}: what was trained is not finite")
        return done
