"""What a fold did, measured: per site, and for the model as a whole."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from oftfx.errors import FoldError, MissingExtraError
from oftfx.files import write_whole
from oftfx.folding.measure import Measured
from oftfx.folding.record import SiteFold
from oftfx.terminal import render

COLUMNS = (
    "site",
    "format",
    "action",
    "update %",
    "error %",
    "output error %",
    "survival",
    "bytes before",
    "bytes after",
    "note",
)
LOW_SURVIVAL, LARGE = 0.9, 0.5
_ADVICE = (
    "quantized='calibrate' with some thousand tokens of calibration=[inputs, ...] loses least of what leaves no float "
    "behind, distil=2 less; 'keep' or 'float' nothing"
)


@dataclass(frozen=True)
class FoldReport:
    """Iterates over its `SiteFold` rows; ``print(report)`` shows a summary, ``table()`` every site.

    Attributes:
        sites: one row a site.
        adapters: what was folded, in order.
        dropped: adapters that did not act and are gone from the folded model.
        measured: the model's outputs on the calibration inputs, folded against unfolded; None where none were given.
        unchecked: what could not be looked at, with the reason.
        distilled: what training the scales did, in words; empty where they were not trained.

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> report = oftfx.fold(model, calibration=[(torch.randn(5, 6),)]).report
        >>> report.adapters, len(report), round(report.survival, 3), report.output_error < 1e-6
        (('default',), 1, 1.0, True)
    """

    sites: tuple[SiteFold, ...]
    adapters: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    measured: Measured | None = None
    unchecked: tuple[str, ...] = ()
    distilled: str = ""

    @property
    def output_error(self) -> float | None:
        """Relative error of the model's outputs on the calibration inputs, or None."""
        return None if self.measured is None else self.measured.output_error

    def __iter__(self) -> Iterator[SiteFold]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def survival(self) -> float:
        """Share of the whole update that arrived: ``sum <W_folded - W, U> / sum |U|^2``, ``U = W_target - W``."""
        total = sum(s.energy for s in self.sites)
        return sum(s.energy * s.survival for s in self.sites) / total if total else 1.0

    @property
    def warnings(self) -> list[str]:
        """What a user should not overlook."""
        found = []
        seen = self.measured
        if seen is not None and seen.effect and seen.output_error > LARGE * seen.effect:
            share = seen.output_error / seen.effect
            found.append(
                f"the error of the model's outputs, {seen.output_error:.1e}, is {share:.0%} of what the adapter does "
                f"to them; {_ADVICE}"
            )
        # A calibrated site makes up for the errors of those before it, so by itself it says little.
        low = [s for s in self.sites if _kept(s) < LOW_SURVIVAL and "calibrated" not in s.action]
        if low:
            worst = min(low, key=_kept)
            found.append(
                f"{len(low)} of {len(self)} sites kept less than {LOW_SURVIVAL:.0%} of their update (worst: "
                f"{worst.fqn}, {_kept(worst):.0%}); {_ADVICE}"
            )
        few = [s.tokens or 0 for s in self.sites if s.few_tokens]
        if few:
            found.append(
                f"{len(few)} of {len(self)} sites were calibrated by few tokens for their width, {min(few)} at least; "
                "give more calibration inputs"
            )
        return found

    def __str__(self) -> str:
        actions = ", ".join(f"{n} {a}" for a, n in Counter(s.action for s in self.sites).items())
        before, after = sum(s.bytes_before for s in self.sites), sum(s.bytes_after for s in self.sites)
        worst = max((s.relative_error for s in self.sites), default=0.0)
        # Float layers are rounded by `oftfx.quantize` alone, without any adapter.
        folded = not any(s.format == "dense" and s.action in ("requantized", "calibrated") for s in self.sites)
        lines = [
            *(f"warning: {w}" for w in self.warnings),
            *(f"not checked: {u}" for u in self.unchecked),
            f"folded {', '.join(self.adapters) or 'nothing'} into {len(self)} sites: {actions or 'none'}"
            if folded
            else f"rounded {len(self)} layers: {actions}",
            f"worst relative error of a weight {worst:.2e}, "
            + (f"survival of the update {self.survival:.1%}, " if folded else "")
            + f"weights {before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB after",
        ]
        if self.distilled:
            lines.append(self.distilled)
        if self.measured is not None:
            effect = self.measured.effect
            against = "" if effect is None else f", where the adapter changes it by {effect:.2e}"
            lines.append(f"relative error of the model's output {self.measured.output_error:.2e}{against}")
            if self.measured.perplexity_before is not None:
                base, kept = self.measured.perplexity_base, self.measured.gain_kept
                without = "" if base is None else f"{base:.3f} without adapter, "
                share = "" if kept is None else f": {kept:.1%} of the gain is kept"
                lines.append(
                    f"perplexity on the calibration inputs {without}{self.measured.perplexity_before:.3f} "
                    f"{'unfolded' if folded else 'in floats'}, {self.measured.perplexity_after:.3f} "
                    f"{'folded' if folded else 'rounded'}{share}"
                )
        if self.dropped:
            lines.append(f"adapters that did not act and are dropped: {', '.join(self.dropped)}")
        return "\n".join(lines)

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, as text."""
        return [
            (
                s.fqn,
                s.format,
                s.action,
                f"{100 * s.update:.3f}",
                f"{100 * s.relative_error:.5f}",
                "" if s.output_error is None else f"{100 * s.output_error:.4f}",
                f"{s.survival:.4f}",
                f"{s.bytes_before:,}",
                f"{s.bytes_after:,}",
                s.note,
            )
            for s in self.sites
        ]

    def table(self) -> str:
        """One row a site (needs the ``report`` extra)."""
        return render("Fold", COLUMNS, self.rows()) + str(self) + "\n"

    def to_json(self) -> str:
        """All figures as JSON text."""
        return json.dumps(
            {**asdict(self), "output_error": self.output_error, "survival": self.survival, "warnings": self.warnings},
            indent=1,
        )

    def to_html(self, path: str | Path) -> None:
        """Write the report as one HTML file (needs the ``report`` extra)."""
        try:
            from jinja2 import Environment
        except ImportError as error:
            raise MissingExtraError("jinja2", "report", "An HTML report") from error
        template = Environment(autoescape=True).from_string(_HTML)
        text = template.render(columns=COLUMNS, rows=self.rows(), summary=str(self).splitlines())
        write_whole(Path(path), text.encode(), FoldError)


def _kept(site: SiteFold) -> float:
    """The share of the update that arrived: in the layer's output where that was seen, else in its weight."""
    return site.survival if site.output_survival is None else site.output_survival


_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>oftfx fold report</title><style>
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; text-align: left; border-bottom: 1px solid #ddd; }
</style></head><body><h1>Fold report</h1>
{% for line in summary %}<p>{{ line }}</p>{% endfor %}
<table><tr>{% for c in columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table></body></html>
"""
