"""Several folds of one adapter side by side: which policy to deploy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from oftfx.errors import FoldError
from oftfx.files import write_whole
from oftfx.folding.compare_page import compare_page
from oftfx.folding.report import FoldReport
from oftfx.pages.figures import written
from oftfx.pages.html import html
from oftfx.pages.markdown import markdown
from oftfx.terminal import render
from oftfx.typed_json import parsed

COLUMNS = ("fold", "verdict", "arrived %", "by", "output error %", "perplexity", "gain kept %", "weights")


@dataclass(frozen=True)
class CompareReport:
    """Reports of several folds of the same adapter, by the name that each is to have.

    Attributes:
        reports: in the order in which they are shown.

    Raises:
        FoldError: there are none.

    Examples:
        >>> import oftfx, torch
        >>> model = oftfx.transform(torch.nn.Sequential(torch.nn.Linear(6, 4)), {"*": oftfx.OFT(3, init="normal")})
        >>> folds = {q: oftfx.fold(model, quantized=q).report for q in ("keep", "float")}
        >>> both = oftfx.CompareReport(folds)
        >>> both.best, oftfx.CompareReport.from_json(both.to_json()) == both
        ('keep', True)
    """

    reports: Mapping[str, FoldReport]

    def __post_init__(self) -> None:
        if not self.reports:
            raise FoldError("CompareReport: got no reports; expected {name: FoldReport} with one at least")

    @property
    def best(self) -> str | None:
        """The smallest whose verdict is green, of two of one size the one that keeps more; None without any."""
        green = {n: r for n, r in self.reports.items() if r.verdict.state == "green"}
        return min(green, key=lambda n: (green[n].bytes_after, -(green[n].verdict.share or 0.0)), default=None)

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, as text; empty where something was not measured."""
        found = list[tuple[str, ...]]()
        for name, report in self.reports.items():
            verdict, seen = report.verdict, report.measured
            perplexity = None if seen is None else seen.perplexity_after
            gain = None if seen is None else seen.gain_kept
            found.append(
                (
                    name,
                    verdict.label,
                    "" if verdict.share is None else f"{100 * verdict.share:.1f}",
                    verdict.measure,
                    "" if seen is None else f"{100 * seen.output_error:.4f}",
                    "" if perplexity is None else f"{perplexity:.3f}",
                    "" if gain is None else f"{100 * gain:.1f}",
                    written(report.bytes_after, "bytes"),
                )
            )
        return found

    def table(self) -> str:
        """One row a fold (needs the ``report`` extra)."""
        return render("Folds compared", COLUMNS, self.rows()) + str(self) + "\n"

    def __str__(self) -> str:
        return compare_page(self.reports, self.best).banner.sentence

    def to_json(self) -> str:
        """All reports by name; `from_json` reads it back."""
        return json.dumps({"best": self.best, "reports": {n: json.loads(r.to_json()) for n, r in self.reports.items()}})

    @classmethod
    def from_json(cls, text: str) -> CompareReport:
        """Inverse of `to_json`.

        Raises:
            FoldError: it is something else.
        """
        try:
            reports = {n: json.dumps(r) for n, r in parsed(text)["reports"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FoldError(
                f"this text is not what CompareReport.to_json() wrote: {type(error).__name__}: {error}"
            ) from None
        return cls({n: FoldReport.from_json(r) for n, r in reports.items()})

    def to_html(self, path: str | Path) -> None:
        """Write the comparison as one HTML file; see `oftfx.FoldReport.to_html`."""
        write_whole(Path(path), html(compare_page(self.reports, self.best)).encode(), FoldError)

    def to_markdown(self) -> str:
        """The comparison as Markdown."""
        return markdown(compare_page(self.reports, self.best))
