"""What a fold did, measured: per site, and for the model as a whole; in every form that people and programs read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from oftfx.errors import FoldError
from oftfx.files import write_whole
from oftfx.folding.facts import FoldFacts
from oftfx.folding.fold_page import fold_page
from oftfx.folding.summary import COLUMNS, cells, summary
from oftfx.pages.html import html
from oftfx.pages.markdown import markdown
from oftfx.pages.pictures import Picture, picture
from oftfx.terminal import render
from oftfx.typed_json import made, parsed


@dataclass(frozen=True)
class FoldReport(FoldFacts):
    """Iterates over its `SiteFold` rows; ``print(report)`` shows a summary, ``table()`` every site.

    Attributes:
        sites: one row a site.
        adapters: what was folded, in order.
        dropped: adapters that did not act and are gone from the folded model.
        measured: the model's outputs on the calibration inputs, folded against unfolded; None where none were given.
        unchecked: what could not be looked at, with the reason.
        distilled: what training the scales did, in words; empty where they were not trained.
        provenance: hashes of the adapters, versions, the command, the calibration.

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> report = oftfx.fold(model, calibration=[(torch.randn(5, 6),)]).report
        >>> report.adapters, len(report), report.verdict.state, report.output_error < 1e-6
        (('default',), 1, 'green', True)
        >>> oftfx.FoldReport.from_json(report.to_json()) == report
        True
    """

    def __str__(self) -> str:
        return "\n".join(summary(self))

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, as text."""
        return [cells(s) for s in self.sites]

    def table(self) -> str:
        """One row a site, without the columns in which nothing stands (needs the ``report`` extra)."""
        rows = self.rows()
        shown = [i for i in range(len(COLUMNS)) if not rows or any(row[i] for row in rows)]
        cells_of = [tuple(row[i] for i in shown) for row in rows]
        return render("Fold", [COLUMNS[i] for i in shown], cells_of) + str(self) + "\n"

    def to_json(self) -> str:
        """All figures as JSON text; `from_json` reads it back."""
        follows = {
            "verdict": asdict(self.verdict),
            "output_error": self.output_error,
            "survival": self.survival,
            "warnings": self.warnings,
        }
        return json.dumps({**asdict(self), **follows}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> FoldReport:
        """Inverse of `to_json`; also takes the text of an ``oftfx_fold.json``, which has a report.

        What follows from the figures (verdict, warnings) is not read but made anew.

        Raises:
            FoldError: it is no report, or a damaged one.
        """
        try:
            said = parsed(text)
            said = said.get("report", said)
            fields = {f.name: said[f.name] for f in dataclasses.fields(cls) if said.get(f.name) is not None}
            return made(cls, {"adapters": said["adapters"], **fields})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FoldError(
                "this text is no report of a fold; expected what FoldReport.to_json() or `oftfx fold --json` wrote, or "
                f"an oftfx_fold.json ({type(error).__name__}: {error})"
            ) from None

    def to_html(self, path: str | Path) -> None:
        """Write the report as one HTML file that needs no other and no network (needs the ``report`` extra).

        Raises:
            FoldError: it cannot be written.
            MissingExtraError: a package of the extra is not installed.
        """
        write_whole(Path(path), html(fold_page(self)).encode(), FoldError)

    def to_markdown(self) -> str:
        """The report as Markdown, for model cards and pull requests: all but the charts and the table of every site."""
        return markdown(fold_page(self))

    def save_figures(self, directory: str | Path, kinds: Iterable[Picture] = ("svg", "png")) -> list[Path]:
        """Write the page's charts as files for papers (needs the ``report`` extra, and no browser).

        Args:
            directory: made where it is not there.
            kinds: ``"svg"``, ``"png"``.

        Returns:
            The files.

        Raises:
            FoldError: they cannot be written.
            MissingExtraError: a package of the extra is not installed.
        """
        made: list[Path] = []
        for chart in fold_page(self).charts:
            for kind in kinds:
                made.append(Path(directory) / f"{chart.name}.{kind}")
                write_whole(made[-1], picture(chart, kind), FoldError)
        return made


def report_from(note: dict[str, Any]) -> FoldReport:
    """The report in an ``oftfx_fold.json`` that was read."""
    return FoldReport.from_json(json.dumps(note))
