"""The tables on a fold's page."""

from __future__ import annotations

import math

from oftfx.folding.facts import FoldFacts
from oftfx.folding.record import SiteFold
from oftfx.folding.verdict import kept
from oftfx.pages.page import Cell, Column, Part, Table, Text
from oftfx.planning.depth import standings

_EXACT = 1e-6


def worst_ten(facts: FoldFacts) -> tuple[Part, ...]:
    """The ten sites that kept least; or that none lost anything."""
    changed = [s for s in facts.sites if s.action != "untouched"]
    if not changed:
        return ()
    if all(s.relative_error <= _EXACT and (s.output_error or 0.0) <= _EXACT for s in changed):
        return (Text((f"No site lost anything: every error is below {_EXACT:.0e}.",)),)
    if facts.rounded_only:
        order = sorted(changed, key=lambda s: -(s.output_error or s.relative_error))[:10]
    else:
        order = sorted(changed, key=_kept_least)[:10]
    columns: tuple[Column, ...] = (
        Column("site", "code"),
        Column("action"),
        Column("survival", "percent", "of the weight"),
        Column("output survival", "percent", "of the layer's outputs"),
        Column("error", "percent"),
        Column("output error", "percent"),
        Column("note"),
    )
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (s.fqn, s.action, s.survival, s.output_survival, s.relative_error, s.output_error, s.note) for s in order
    )
    told = "with the largest errors" if facts.rounded_only else "that kept least of their update"
    columns, rows = _without(columns, rows, facts.rounded_only)
    return (Table(f"The {len(order)} sites {told}, the worst first.", columns, rows),)


def every_site(facts: FoldFacts) -> Table:
    """All of it, to be sorted, searched and grouped."""
    places = standings(s.fqn for s in facts.sites)
    columns: tuple[Column, ...] = (
        Column("site", "code"),
        Column("layer", "count", "the first number in its path", groups=True),
        Column("kind", groups=True, filters=True, hidden=True),
        Column("format", filters=True),
        Column("action", filters=True, groups=True),
        Column("update", "percent", "how far the rotation moves the weight"),
        Column("error", "percent", "of the weight", extreme="highest"),
        Column("output error", "percent", "of the layer's outputs", extreme="highest"),
        Column("survival", "percent", "of the update in the weight", extreme="lowest"),
        Column("output survival", "percent", "of the update in the layer's outputs", extreme="lowest"),
        Column("angle", "angle", "the largest of its blocks", extreme="highest"),
        Column("typical angle", "angle", "root mean square of all angles"),
        Column("before", "bytes"),
        Column("after", "bytes"),
        Column("note"),
        Column("layers alike", groups=True, hidden=True),
    )
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            s.fqn,
            places[s.fqn].depth,
            places[s.fqn].kind,
            s.format,
            s.action,
            s.update,
            s.relative_error,
            s.output_error,
            None if s.action == "untouched" else s.survival,
            None if s.action == "untouched" else s.output_survival,
            s.angle,
            s.typical_angle,
            s.bytes_before,
            s.bytes_after,
            s.note,
            places[s.fqn].group,
        )
        for s in facts.sites
    )
    columns, rows = _without(columns, rows, facts.rounded_only)
    caption = f"All {len(facts)} sites. A dash: not measured, or nothing to fold."
    return Table(caption, columns, rows, tools=True)


def _kept_least(site: SiteFold) -> tuple[float, float]:
    """What is not a number comes first."""
    share = kept(site)
    return (-math.inf if share is None or math.isnan(share) else share), -site.relative_error


def _without(
    columns: tuple[Column, ...], rows: tuple[tuple[Cell, ...], ...], rounded_only: bool
) -> tuple[tuple[Column, ...], tuple[tuple[Cell, ...], ...]]:
    """Only columns in which something stands; where no adapter was folded there is no update either."""
    never = {"update", "survival", "output survival"} if rounded_only else set()
    stays = [
        i
        for i, column in enumerate(columns)
        if column.title not in never and (not rows or any(row[i] not in (None, "") for row in rows))
    ]
    return tuple(columns[i] for i in stays), tuple(tuple(row[i] for i in stays) for row in rows)
