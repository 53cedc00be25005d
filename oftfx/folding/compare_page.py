"""Several folds as one page."""

from __future__ import annotations

from collections.abc import Mapping

from oftfx.folding.facts import FoldFacts
from oftfx.folding.fold_page import MADE_BY, origin, survival_map
from oftfx.folding.glossary import glossary
from oftfx.folding.next_steps import next_steps
from oftfx.folding.verdict import kept
from oftfx.pages.charts import bars
from oftfx.pages.figures import nbytes
from oftfx.pages.page import Banner, Cell, Chart, Code, Column, Page, Part, Section, State, Table, Terms, Text


def compare_page(reports: Mapping[str, FoldFacts], best: str | None) -> Page:
    """Which fold to take, all of them side by side, where each lost what, every site.

    Args:
        reports: by the name of the fold.
        best: the one to take, if there is one.
    """
    names = ", ".join(reports)
    sections = [
        Section("Side by side", (side_by_side(reports), *_charts(reports))),
        Section("Where each arrived", _maps(reports)),
        Section("Every site", _sites(reports)),
        Section("Provenance", _origins(reports)),
        Section("Next step", _next(reports, best)),
        Section("Glossary", (Terms(glossary(s.action for r in reports.values() for s in r)),)),
    ]
    return Page(
        title="Folds compared",
        subtitle=f"{len(reports)} folds: {names}",
        banner=_banner(reports, best),
        notices=_notices(reports),
        sections=tuple(s for s in sections if s.parts),
        made_by=MADE_BY,
    )


def side_by_side(reports: Mapping[str, FoldFacts]) -> Table:
    """One row a fold."""
    columns = (
        Column("fold", "code"),
        Column("verdict"),
        Column("arrived", "percent", "the verdict's share"),
        Column("by"),
        Column("output error", "percent", "of the whole model's outputs"),
        Column("perplexity", "fixed"),
        Column("gain kept", "percent"),
        Column("weights before", "bytes"),
        Column("weights after", "bytes"),
    )
    rows = tuple(_row(name, report) for name, report in reports.items())
    return Table("One row a fold; a dash: not measured.", columns, rows)


def _row(name: str, report: FoldFacts) -> tuple[Cell, ...]:
    verdict, seen = report.verdict, report.measured
    measured = (None, None, None) if seen is None else (seen.output_error, seen.perplexity_after, seen.gain_kept)
    return name, verdict.label, verdict.share, verdict.measure, *measured, report.bytes_before, report.bytes_after


def _banner(reports: Mapping[str, FoldFacts], best: str | None) -> Banner:
    if best is not None:
        verdict, size = reports[best].verdict, nbytes(reports[best].bytes_after)
        arrived = "" if verdict.share is None else f"{verdict.share:.1%} by the {verdict.measure}, "
        return Banner("green", f"Take {best!r}", f"The smallest fold in which the adapter arrived ({arrived}{size}).")
    shares = {n: r.verdict.share for n, r in reports.items() if r.verdict.share is not None}
    if not shares:
        return Banner("neutral", "Not judged", "In none of these folds was it measured whether the adapter arrived.")
    most = max(shares, key=lambda n: shares[n])
    verdict = reports[most].verdict
    state: State = "amber" if verdict.state == "amber" else "red"
    return Banner(
        state, "In none of these folds did the adapter arrive", f"Most of it did by {most!r}: {verdict.sentence}"
    )


def _notices(reports: Mapping[str, FoldFacts]) -> tuple[str, ...]:
    found = []
    measures = {r.verdict.measure for r in reports.values() if r.verdict.measure}
    if len(measures) > 1:
        found.append(
            f"The folds were judged by different measures ({', '.join(sorted(measures))}), whose shares do not "
            "compare: fold all of them with the same calibration inputs."
        )
    hashes = {tuple(sorted(r.provenance.hashes.values())) for r in reports.values() if r.provenance.hashes}
    if len(hashes) > 1:
        found.append("These are folds of different adapters: their hashes differ.")
    return tuple(found)


def _charts(reports: Mapping[str, FoldFacts]) -> tuple[Chart, ...]:
    charts = []
    shares = [(n, r.verdict.share) for n, r in reports.items() if r.verdict.share is not None]
    if shares:
        title = "What of the adapter arrived"
        charts.append(bars("arrived", title, shares, measure="share that arrived", style="percent"))
    sizes = [(n, float(r.bytes_after)) for n, r in reports.items()]
    before = float(max(r.bytes_before for r in reports.values()))
    title = "Size of the weights"
    charts.append(bars("size", title, sizes, measure="size", style="bytes", lines=[("before the fold", before)]))
    seen = {n: r.measured for n, r in reports.items() if r.measured is not None}
    after = [(n, m.perplexity_after) for n, m in seen.items() if m.perplexity_after is not None]
    if after:
        first = next(m for m in seen.values() if m.perplexity_after is not None)
        marks = [("without the adapter", first.perplexity_base), ("unfolded", first.perplexity_before)]
        lines = [(n, v) for n, v in marks if v is not None]
        title = "Perplexity on the calibration inputs; lower is better"
        charts.append(bars("perplexity", title, after, measure="perplexity", lines=lines, dots=True))
    return tuple(charts)


def _maps(reports: Mapping[str, FoldFacts]) -> tuple[Part, ...]:
    maps = [survival_map(r, f"survival-{i}", f"Survival, {n}") for i, (n, r) in enumerate(reports.items())]
    found = [m for m in maps if m is not None]
    return (Text(("Bright: the update arrived. All on one scale.",)), *found) if found else ()


def _sites(reports: Mapping[str, FoldFacts]) -> tuple[Part, ...]:
    """What of each site's update arrived, fold by fold."""
    sites = {n: {s.fqn: s for s in r} for n, r in reports.items()}
    paths = dict.fromkeys(path for some in sites.values() for path in some)
    columns = [Column("site", "code")]
    for name in reports:
        columns += [
            Column(f"{name}: action"),
            Column(f"{name}: survival", "percent"),
            Column(f"{name}: error", "percent"),
        ]
    rows = []
    for path in paths:
        row: list[Cell] = [path]
        for some in sites.values():
            site = some.get(path)
            row += [None, None, None] if site is None else [site.action, kept(site), site.relative_error]
        rows.append(tuple(row))
    return (Table("Every site in every fold.", tuple(columns), tuple(rows), tools=True),)


def _origins(reports: Mapping[str, FoldFacts]) -> tuple[Part, ...]:
    """Once, where all folds have the same."""
    terms = {n: origin(r.provenance, r.adapters, r.dropped) for n, r in reports.items()}
    if len({t.pairs for t in terms.values()}) == 1:
        return (next(iter(terms.values())),)
    return tuple(part for n, t in terms.items() for part in (Text((f"{n}:",)), t))


def _next(reports: Mapping[str, FoldFacts], best: str | None) -> tuple[Part, ...]:
    if best is not None:
        return next_steps(reports[best])
    told = "Try a policy that keeps more, or train through the rounding itself."
    return Text((told,)), Code(
        'with oftfx.fold_aware(model, "requantize"):\n    ...    # train some steps, then fold again'
    )
