"""A plan as a page."""

from __future__ import annotations

from collections.abc import Sequence

from oftfx.pages.charts import Spot, bars, heat_map
from oftfx.pages.figures import nbytes, percent
from oftfx.pages.page import Banner, Box, Code, Column, Drawing, Page, Part, Section, Table, Terms, Text, Tile, Tiles
from oftfx.planning.coverage import Coverage
from oftfx.planning.depth import standings
from oftfx.planning.plan_table import pattern, ranges
from oftfx.planning.site_plan import SitePlan, Skipped, TraceInfo
from oftfx.version import __version__

_GLOSSARY = (
    ("Site", "one layer whose weight a rotation stands in front of."),
    ("Blocks", "a rotation is block-diagonal: so many blocks of one size, together as wide as the layer's input."),
    ("Trainable", "numbers that train: block size * (block size - 1) / 2 a block."),
    ("Rotation", "the site's own, or that of another site that reads the same input."),
    ("Rotates", "what the rotation acts on: the layer's input, its output (an embedding), or its weight."),
    ("Folds into", "the layer before it, into whose rows a fold can put the rotation instead."),
    ("Captured", "how the model's program was seen; without it every site is found, and none shares a rotation."),
)


def plan_page(
    model: str,
    summary: Sequence[str],
    entries: Sequence[SitePlan],
    skipped: Sequence[Skipped],
    trace: TraceInfo,
    coverage: Coverage,
) -> Page:
    """What will be rotated, where, what is left out and why.

    Args:
        model: class of the model.
        summary: of the plan, in lines, without what the page says at its head.
        entries: the sites.
        skipped: what rules reached without effect.
        trace: how the program was captured.
        coverage: bytes of weights that are reached.
    """
    notices = [f"Not called by the example inputs: {', '.join(trace.never_called)}"] if trace.never_called else []
    if trace.rung == "tree":
        notices.append(f"The program was not captured ({trace.reason}); every site has a rotation of its own.")
    sections = [
        Section("What is rotated", _tiles(entries, coverage)),
        Section("Where", _where(entries)),
        Section("Every site", (_sites(entries),) if entries else ()),
        Section("Not reached", _left_out(skipped, coverage)),
        Section("One site", _drawing(entries)),
        Section("Summary", (Text(tuple(summary)),)),
        Section("Next step", _next(model)),
        Section("Glossary", (Terms(_GLOSSARY),)),
    ]
    return Page(
        title="Plan",
        subtitle=f"rotations for {model}; nothing is changed yet",
        banner=_banner(entries, trace, coverage),
        notices=tuple(notices),
        sections=tuple(s for s in sections if s.parts),
        made_by=f"oftfx {__version__}",
    )


def _banner(entries: Sequence[SitePlan], trace: TraceInfo, coverage: Coverage) -> Banner:
    if not entries:
        return Banner("red", "Nothing is rotated", "No rule reaches a layer that can be rotated.")
    reach = f" They reach {percent(coverage.share)} of the bytes of its weight matrices." if coverage.total else ""
    told = (
        f"{len(entries)} sites with {_rotations(entries)} rotations, {_trainable(entries):,} trainable numbers.{reach}"
    )
    if trace.never_called:
        return Banner("amber", "Some sites were never called", told)
    return Banner("green", "Ready to insert", told)


def _tiles(entries: Sequence[SitePlan], coverage: Coverage) -> tuple[Part, ...]:
    shared = len(entries) - _rotations(entries)
    reach = percent(coverage.share) if coverage.total else None
    tiles = (
        Tile(
            "Sites",
            f"{len(entries):,}",
            f"{shared} share another's rotation" if shared else "each has its own rotation",
        ),
        Tile("Trainable numbers", f"{_trainable(entries):,}", f"{nbytes(4 * _trainable(entries))} in float32"),
        Tile("Weights reached", reach, f"of {nbytes(coverage.total)} of weight matrices" if coverage.total else ""),
    )
    return (Tiles(tiles),)


def _where(entries: Sequence[SitePlan]) -> tuple[Part, ...]:
    places = standings(e.fqn for e in entries)
    spots = [Spot(e.fqn, places[e.fqn].depth, places[e.fqn].kind, e.trainable) for e in entries]
    title = "Trainable numbers of each site; none where it shares another's rotation"
    chart = heat_map("trainable", title, spots, measure="trainable numbers", style="count")
    return () if chart is None else (chart,)


def _sites(entries: Sequence[SitePlan]) -> Table:
    places = standings(e.fqn for e in entries)
    columns = (
        Column("site", "code"),
        Column("layer", "count", "the first number in its path", groups=True),
        Column("kind", groups=True, filters=True, hidden=True),
        Column("layer kind", filters=True, groups=True),
        Column("format", filters=True),
        Column("in", "count"),
        Column("out", "count"),
        Column("blocks", "count"),
        Column("block size", "count"),
        Column("trainable", "count", extreme="highest"),
        Column("rotates"),
        Column("rotation of"),
        Column("folds into"),
        Column("rule", filters=True, groups=True),
        Column("notes"),
        Column("layers alike", groups=True, hidden=True),
    )
    rows = []
    for e in entries:
        site, place = e.site, places[e.fqn]
        rows.append(
            (
                e.fqn,
                place.depth,
                place.kind,
                site.kind,
                site.format,
                site.in_features,
                site.out_features,
                e.blocks,
                e.block_size,
                e.trainable,
                "output" if site.layout.side == "output" else "input" if e.placement == "activation" else "weight",
                "its own" if e.owner == e.fqn else e.owner,
                e.producer.fqn if e.producer else "",
                e.rule,
                "; ".join(e.notes),
                place.group,
            )
        )
    return Table(f"All {len(entries)} sites.", columns, tuple(rows), tools=True)


def _left_out(skipped: Sequence[Skipped], coverage: Coverage) -> tuple[Part, ...]:
    parts: list[Part] = []
    groups: dict[str, list[tuple[str, int]]] = {}
    for weight in coverage.unreached:
        groups.setdefault(pattern(weight.name), []).append((weight.name, weight.nbytes))
    if groups:
        sizes = sorted(
            ((ranges([n for n, _ in g]), sum(b for _, b in g)) for g in groups.values()), key=lambda p: -p[1]
        )
        shares = [(name, size / coverage.total) for name, size in sizes[:12]]
        title = "The largest weight matrices that no rotation reaches"
        parts.append(bars("unreached", title, shares, measure="share of all weight matrices", style="percent"))
    if skipped:
        columns = Column("module", "code"), Column("class"), Column("reason")
        rows = tuple((s.fqn, s.module_class, s.reason) for s in skipped)
        parts.append(Table("What a rule reached and is not rotated.", columns, rows))
    return tuple(parts)


def _drawing(entries: Sequence[SitePlan]) -> tuple[Part, ...]:
    """The first site: its node before, and what it becomes."""
    if not entries:
        return ()
    entry = entries[0]
    site, name = entry.site, entry.fqn.rpartition(".")[2]
    given, y = Box("ids" if site.kind == "embedding" else "x", role="plain"), Box("y", role="plain")
    layer = Box(name, f"{site.out_features} x {site.in_features}, {site.format}")
    rotation = Box("rotation R", f"{entry.blocks} blocks of {entry.block_size}", "rotation")
    if site.layout.side == "output":
        inner: tuple[Box, ...] = (layer, rotation)
    elif entry.placement == "weight":
        inner = (Box(name, "W Rᵀ, made in every forward", "changed"),)
    else:
        inner = (rotation, layer)
    return (Drawing(f"What becomes of {entry.fqn}", ("Before", (given, layer, y)), ("After", (given, *inner, y))),)


def _next(model: str) -> tuple[Part, ...]:
    told = "Insert the rotations, train them with any loop, and fold them into the weights."
    code = (
        f"model = oftfx.transform(model, rules)    # the same {model}, with rotations\n...\nresult = oftfx.fold(model)"
    )
    return Text((told,)), Code(code)


def _rotations(entries: Sequence[SitePlan]) -> int:
    return sum(e.owner == e.fqn for e in entries)


def _trainable(entries: Sequence[SitePlan]) -> int:
    return sum(e.trainable for e in entries)
