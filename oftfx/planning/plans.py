"""What will be done: rules resolved to sites, as pure data. Printable, and JSON both ways."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

from oftfx.errors import MissingExtraError, RuleError
from oftfx.files import of_version, write_whole
from oftfx.pages.html import html
from oftfx.pages.markdown import markdown
from oftfx.pages.page import Page
from oftfx.planning.coverage import Coverage
from oftfx.planning.plan_page import plan_page
from oftfx.planning.plan_table import pattern, plan_rows, plan_table, ranges
from oftfx.planning.site_plan import SitePlan, Skipped, TraceInfo
from oftfx.typed_json import made, parsed

VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Rules resolved to sites. Iterates over its `SitePlan`; ``print(plan)`` shows a table.

    Attributes:
        model_class: class of the model it was made for.
        entries: the sites that are rotated.
        skipped: what rules reached without effect, with reasons.
        trace: how the program was captured.
        train: names of parameters, other than rotations, that train whole and are saved with the adapter.
        train_modules: paths of the modules that train whole.
        train_buffers: names of their buffers, of which each adapter has its own, as of what they train.
        brought: names of base parameters that a file came with; the adapter has its own, which never train.
        train_bias: the biases that were asked for: ``"none"``, ``"all"`` or ``"oft"``.
        coverage: bytes of weight matrices that are rotated, and which are not.

    Examples:
        >>> import oftfx, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 4))
        >>> plan = oftfx.plan(model, {"*": oftfx.OFT(3)})
        >>> [(site.fqn, site.blocks, site.trainable) for site in plan]
        [('0', 2, 6), ('1', 3, 9)]
        >>> oftfx.Plan.from_json(plan.to_json()) == plan
        True
    """

    model_class: str
    entries: tuple[SitePlan, ...]
    skipped: tuple[Skipped, ...] = ()
    trace: TraceInfo = field(default_factory=TraceInfo)
    train: tuple[str, ...] = ()
    train_modules: tuple[str, ...] = ()
    train_bias: str = "none"
    train_buffers: tuple[str, ...] = ()
    brought: tuple[str, ...] = ()
    coverage: Coverage = field(default_factory=Coverage)

    def __iter__(self) -> Iterator[SitePlan]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, fqn: str) -> SitePlan:
        for entry in self.entries:
            if entry.fqn == fqn:
                return entry
        raise KeyError(fqn)

    @property
    def trainable(self) -> int:
        """Trainable numbers of all rotations."""
        return sum(e.trainable for e in self.entries)

    @property
    def rotations(self) -> int:
        """Number of distinct rotations."""
        return sum(e.owner == e.fqn for e in self.entries)

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` reads it back."""
        data = asdict(self)
        for entry, source in zip(data["entries"], self.entries, strict=True):
            entry["spec"] = source.spec.to_dict()
        return json.dumps({"oftfx_plan": VERSION, **data}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Inverse of `to_json`.

        Raises:
            RuleError: not a plan, or one of another version.
        """
        try:
            data = parsed(text)
            version = data.pop("oftfx_plan")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise RuleError("this text is not an oftfx plan; expected what Plan.to_json() wrote") from None
        if version != VERSION:
            raise RuleError(f"this plan has {of_version(version, VERSION)}")
        try:
            return made(cls, data)
        except ValueError as error:
            raise RuleError(f"this text is a damaged oftfx plan: {error}") from None

    def table(self, *, full: bool = False) -> str:
        """The plan as a table (needs the ``report`` extra).

        Args:
            full: one row a site; otherwise layers that differ only in their number share a row.
        """
        return plan_table(self._title, self, full=full) + "\n".join(self.summary()) + "\n"

    def __str__(self) -> str:
        try:
            return self.table()
        except MissingExtraError:  # the same rows without a table package
            rows = ["  ".join(c for c in row if c) for row in plan_rows(self)]
            return "\n".join([self._title, *rows, *self.summary()])

    def to_html(self, path: str | Path) -> None:
        """Write the plan as one HTML file that needs no other and no network (needs the ``report`` extra).

        Raises:
            OftfxError: it cannot be written.
            MissingExtraError: a package of the extra is not installed.
        """
        write_whole(Path(path), html(self._page()).encode())

    def to_markdown(self) -> str:
        """The plan as Markdown: all but the charts and the table of every site."""
        return markdown(self._page())

    def _page(self) -> Page:
        return plan_page(self.model_class, self.summary()[1:], self.entries, self.skipped, self.trace, self.coverage)

    @property
    def _title(self) -> str:
        return f"Plan for {self.model_class}"

    def summary(self) -> list[str]:
        """What the table's rows do not say, line by line."""
        trace = self.trace
        captured = {
            "graph": f"whole program, {trace.nodes} nodes",
            "analysis": f"for analysis only, {trace.nodes} nodes",
        }
        lines = [
            f"{len(self)} sites, {self.rotations} rotations, {self.trainable:,} trainable numbers",
            f"captured: {captured.get(trace.rung, 'module tree only')}"
            + (f" ({trace.reason})" if trace.reason else ""),
        ]
        coverage = self.coverage
        if coverage.total:
            lines.append(
                f"reaches {coverage.share:.1%} of {coverage.total / 2**20:,.1f} MiB of weight matrices"
                + (f"; not: {_largest(self)}" if coverage.unreached else "")
            )
        if trace.never_called:
            lines.append(f"never called by the example inputs: {', '.join(trace.never_called)}")
        if self.train:
            lines.append(f"train whole: {', '.join(self.train)}")
        for reason, group in groupby(self.skipped, key=lambda s: s.reason):
            names = [s.fqn for s in group]
            equal = len({pattern(n) for n in names}) == 1
            lines.append(f"not rotated: {ranges(names) if equal else ', '.join(names[:5])}: {reason}")
        return lines


def _largest(plan: Plan, count: int = 8) -> str:
    """The matrices that are not reached, those of equal layers together, the largest first."""
    groups: dict[str, list[str]] = defaultdict(list)
    sizes: dict[str, int] = defaultdict(int)
    for weight in plan.coverage.unreached:
        groups[pattern(weight.name)].append(weight.name)
        sizes[pattern(weight.name)] += weight.nbytes
    order = sorted(groups, key=lambda p: -sizes[p])
    shown = [f"{ranges(groups[p])} ({sizes[p] / plan.coverage.total:.1%})" for p in order[:count]]
    return ", ".join(shown) + (f" and {len(order) - count} more" if len(order) > count else "")
