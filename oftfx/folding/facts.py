"""The figures of a fold, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from oftfx.folding.measure import Measured
from oftfx.folding.provenance import Provenance
from oftfx.folding.record import SiteFold
from oftfx.folding.verdict import ARRIVED, Verdict, kept, verdict_of, weight_share

ADVICE = (
    "quantized='calibrate' with some thousand tokens of calibration=[inputs, ...] loses least of what leaves no float "
    "behind, distil=2 less; 'keep' or 'float' nothing"
)


@dataclass(frozen=True)
class FoldFacts:
    """What `oftfx.FoldReport` shows; its attributes are described there."""

    sites: tuple[SiteFold, ...]
    adapters: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    measured: Measured | None = None
    unchecked: tuple[str, ...] = ()
    distilled: str = ""
    provenance: Provenance = field(default_factory=Provenance)

    def __iter__(self) -> Iterator[SiteFold]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def rounded_only(self) -> bool:
        """Whether no adapter was folded: float layers are rounded by `oftfx.quantize` alone, without any."""
        return any(s.format == "dense" and s.action in ("requantized", "calibrated") for s in self.sites)

    @property
    def verdict(self) -> Verdict:
        """Whether the adapter arrived; see `Verdict`."""
        return verdict_of(self.sites, self.measured, rounded_only=self.rounded_only)

    @property
    def output_error(self) -> float | None:
        """Relative error of the model's outputs on the calibration inputs, or None."""
        return None if self.measured is None else self.measured.output_error

    @property
    def survival(self) -> float | None:
        """Share of the whole update in the weights: ``sum <W_folded - W, U> / sum |U|^2``, ``U = W_target - W``.

        None where there was nothing to fold. Error-compensated rounding moves weights for the sake of the outputs:
        `verdict` goes by these.
        """
        return weight_share(self.sites)

    @property
    def bytes_before(self) -> int:
        """Of all weights."""
        return sum(s.bytes_before for s in self.sites)

    @property
    def bytes_after(self) -> int:
        """Of all weights, with rotations that stay in front."""
        return sum(s.bytes_after for s in self.sites)

    @property
    def warnings(self) -> list[str]:
        """What a user should not overlook; a verdict that is not good comes first."""
        found, verdict = [], self.verdict
        if verdict.state in ("amber", "red"):
            found.append(f"{verdict.sentence.removesuffix('.')}; {ADVICE}")
        if verdict.state == "nothing":
            found.append(verdict.sentence)
        # A calibrated site makes up for the errors of those before it, so by itself it says little.
        shares = {s.fqn: kept(s) for s in self.sites if "calibrated" not in s.action}
        low = {n: v for n, v in shares.items() if v is not None and v < ARRIVED}
        if low and verdict.state != "green":
            worst = min(low, key=lambda n: low[n])
            advice = f"; {ADVICE}" if verdict.state == "unknown" else ""
            found.append(
                f"{len(low)} of {len(self)} sites kept less than {ARRIVED:.0%} of their update (worst: {worst}, "
                f"{low[worst]:.1%}){advice}"
            )
        few = [s.tokens or 0 for s in self.sites if s.few_tokens]
        if few:
            found.append(
                f"{len(few)} of {len(self)} sites were calibrated by few tokens for their width, {min(few)} at least; "
                "give more calibration inputs"
            )
        return found
