"""A plan as text."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import groupby
from typing import TYPE_CHECKING

from oftfx.report.rich_table import render

if TYPE_CHECKING:
    from oftfx.plans import Plan, SitePlan

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


def plan_table(plan: Plan, *, full: bool = False) -> str:
    """A plan as a table by `rich`, with a summary below; see `Plan.table`."""
    return (
        render(f"Plan for {plan.model_class}", COLUMNS, plan_rows(plan, full=full)) + "\n".join(_summary(plan)) + "\n"
    )


def plan_text(plan: Plan) -> str:
    """The same rows without a table package: what ``print(plan)`` shows in a bare installation."""
    try:
        return plan_table(plan)
    except ImportError:
        lines = ["  ".join(c for c in row if c) for row in plan_rows(plan)]
        return "\n".join([f"Plan for {plan.model_class}", *lines, *_summary(plan)])


def plan_rows(plan: Plan, *, full: bool = False) -> list[tuple[str, ...]]:
    """One row a site, or one for sites that differ only in a number of their path."""
    groups: dict[tuple[str, ...], list[SitePlan]] = defaultdict(list)
    for entry in plan:
        groups[(entry.fqn,) if full else (_pattern(entry.fqn), *_cells(entry))].append(entry)
    return [(_ranges([e.fqn for e in group]), str(len(group)), *_cells(group[0])) for group in groups.values()]


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


def _summary(plan: Plan) -> list[str]:
    trace = plan.trace
    captured = {
        "graph": f"whole program, {trace.nodes} nodes",
        "analysis": f"for analysis only, {trace.nodes} nodes",
    }
    lines = [
        f"{len(plan)} sites, {plan.rotations} rotations, {plan.trainable:,} trainable numbers",
        f"captured: {captured.get(trace.rung, 'module tree only')}" + (f" ({trace.reason})" if trace.reason else ""),
    ]
    coverage = plan.coverage
    if coverage.total:
        lines.append(
            f"reaches {coverage.share:.1%} of {coverage.total / 2**20:,.1f} MiB of weight matrices"
            + (f"; not: {_largest(plan)}" if coverage.unreached else "")
        )
    if trace.never_called:
        lines.append(f"never called by the example inputs: {', '.join(trace.never_called)}")
    if plan.train:
        lines.append(f"train whole: {', '.join(plan.train)}")
    for reason, group in groupby(plan.skipped, key=lambda s: s.reason):
        names = [s.fqn for s in group]
        lines.append(f"not rotated: {_ranges(names) if _same(names) else ', '.join(names[:5])}: {reason}")
    return lines


def _largest(plan: Plan, count: int = 8) -> str:
    """The matrices that are not reached, those of equal layers together, the largest first."""
    groups: dict[str, list[str]] = defaultdict(list)
    sizes: dict[str, int] = defaultdict(int)
    for weight in plan.coverage.unreached:
        groups[_pattern(weight.name)].append(weight.name)
        sizes[_pattern(weight.name)] += weight.nbytes
    order = sorted(groups, key=lambda p: -sizes[p])
    shown = [f"{_ranges(groups[p])} ({sizes[p] / plan.coverage.total:.1%})" for p in order[:count]]
    return ", ".join(shown) + (f" and {len(order) - count} more" if len(order) > count else "")


def _pattern(fqn: str) -> str:
    return re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "{}", fqn)


def _same(names: list[str]) -> bool:
    return len({_pattern(n) for n in names}) == 1


def _ranges(names: list[str]) -> str:
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
