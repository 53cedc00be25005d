"""Planned sites as rows of a table; those of equal layers share one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from oftfx.planning.site_plan import SitePlan
from oftfx.terminal import render

COLUMNS = (
    "site",
    "n",
    "kind",
    "format",
    "in",
    "out",
    "blocks",
    "rotates",
    "rotation",
    "same input as",
    "folds into",
    "notes",
)


def plan_table(title: str, entries: Iterable[SitePlan], *, full: bool = False) -> str:
    """Planned sites as a table by `rich`; see `oftfx.planning.plans.Plan.table`."""
    return render(title, COLUMNS, plan_rows(entries, full=full))


def plan_rows(entries: Iterable[SitePlan], *, full: bool = False) -> list[tuple[str, ...]]:
    """One row a site, or one for sites that differ only in a number of their path."""
    groups: dict[tuple[str, ...], list[SitePlan]] = defaultdict(list)
    for entry in entries:
        groups[(entry.fqn,) if full else (pattern(entry.fqn), *_cells(entry))].append(entry)
    return [(ranges([e.fqn for e in group]), str(len(group)), *_cells(group[0])) for group in groups.values()]


def _cells(entry: SitePlan) -> tuple[str, ...]:
    def short(fqn: str) -> str:
        return fqn.rpartition(".")[2]

    site = entry.site
    owner = "own" if entry.owner == entry.fqn else f"of {short(entry.owner)}"
    return (
        site.kind,
        site.format,
        str(site.in_features),
        str(site.out_features),
        f"{entry.blocks} x {entry.block_size}",
        "output" if site.layout.side == "output" else "input" if entry.placement == "activation" else "weight",
        owner,
        " ".join(map(short, entry.same_input)),
        short(entry.producer.fqn) if entry.producer else "",
        "; ".join(entry.notes),
    )


def pattern(fqn: str) -> str:
    """A path with its numbers left open."""
    return re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "{}", fqn)


def ranges(names: Sequence[str]) -> str:
    """``a.{0..2}.b`` for ``a.0.b a.1.b a.2.b``; the names share one pattern."""
    parts = [n.split(".") for n in names]
    result = []
    for column in zip(*parts, strict=True):
        values = sorted(set(column), key=lambda v: (len(v), v))
        result.append(values[0] if len(values) == 1 else _range(values))
    return ".".join(result)


def _range(values: list[str]) -> str:
    numbers = [int(v) for v in values]
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(values) + "}"
