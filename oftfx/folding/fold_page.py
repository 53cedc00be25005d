"""A fold's report as a page."""

from __future__ import annotations

from collections import Counter

from oftfx.folding.facts import ADVICE, FoldFacts
from oftfx.folding.fold_tables import every_site, worst_ten
from oftfx.folding.glossary import glossary
from oftfx.folding.next_steps import next_steps
from oftfx.folding.provenance import Provenance
from oftfx.folding.record import SiteFold
from oftfx.folding.summary import actions
from oftfx.folding.verdict import Verdict, kept
from oftfx.pages.charts import Spot, heat_map
from oftfx.pages.figures import nbytes, written
from oftfx.pages.page import (
    Banner,
    Box,
    Chart,
    Column,
    Drawing,
    Page,
    Part,
    Section,
    State,
    Table,
    Terms,
    Text,
    Tile,
    Tiles,
)
from oftfx.planning.depth import standings
from oftfx.version import __version__

MADE_BY = f"oftfx {__version__}"
_STATES: dict[str, State] = {"green": "green", "amber": "amber", "red": "red"}
_GIVE = "give the fold calibration=[inputs, ...]"


def fold_page(facts: FoldFacts) -> Page:
    """Verdict, before and after, where it arrived, the worst, every site, angles, a drawing, origin, next step."""
    sections = [
        Section("Before and after", before_and_after(facts)),
        Section("Where it arrived", where(facts)),
        Section("Least kept", worst_ten(facts)),
        Section("Every site", (every_site(facts),)),
        Section("Rotation angles", _angles(facts)),
        Section("One site", _drawing(facts)),
        Section("Provenance", (origin(facts.provenance, facts.adapters, facts.dropped),)),
        Section("Next step", next_steps(facts)),
        Section("Glossary", (Terms(glossary(s.action for s in facts.sites)),)),
    ]
    what = "layers rounded" if facts.rounded_only else f"{', '.join(facts.adapters) or 'nothing'} folded"
    of = f" of {facts.provenance.model}" if facts.provenance.model else ""
    sentence = facts.verdict.sentence.removesuffix(".")  # which the banner says
    notices = [f"What helps: {ADVICE}."] if facts.verdict.state in ("amber", "red") else []
    notices += [w for w in facts.warnings if not w.startswith(sentence)]
    notices += [f"Not checked: {u}" for u in facts.unchecked]
    return Page(
        title="Fold report",
        subtitle=f"{what}: {len(facts)} sites{of} ({actions(facts)})",
        banner=banner_of(facts.verdict),
        notices=tuple(notices),
        sections=tuple(s for s in sections if s.parts),
        made_by=MADE_BY,
    )


def banner_of(verdict: Verdict) -> Banner:
    """The verdict as the page's head; the label is not said twice."""
    sentence = verdict.sentence.removeprefix(f"{verdict.label}: ")
    return Banner(_STATES.get(verdict.state, "neutral"), verdict.label, sentence[:1].upper() + sentence[1:])


def before_and_after(facts: FoldFacts) -> tuple[Part, ...]:
    """Size, perplexity, error: what was measured, and what would measure the rest."""
    verdict, seen = facts.verdict, facts.measured
    arrived = None if verdict.share is None else f"{verdict.share:.1%}"
    by = f"by the {verdict.measure}" if verdict.measure else ""
    tiles = [
        Tile("Arrived", "nothing to fold" if verdict.state == "nothing" else arrived, by),
        Tile("Weights of these sites", f"{nbytes(facts.bytes_before)} → {nbytes(facts.bytes_after)}", actions(facts)),
    ]
    if seen is None:
        tiles += [Tile("Error of the model's outputs", None, _GIVE), Tile("Perplexity", None, _GIVE)]
        return (Tiles(tuple(tiles)),)
    effect = "" if seen.effect is None else f"the adapter changes them by {written(seen.effect, 'percent')}"
    tiles.append(Tile("Error of the model's outputs", written(seen.output_error, "percent"), effect))
    if seen.perplexity_before is None or seen.perplexity_after is None:
        tiles.append(Tile("Perplexity", None, "the model is no causal language model, or has no token inputs"))
        return (Tiles(tuple(tiles)),)
    gain = (
        "no gain to be kept on these inputs" if seen.gain_kept is None else f"{seen.gain_kept:.1%} of the gain is kept"
    )
    shown = f"{seen.perplexity_before:.3f} → {seen.perplexity_after:.3f}"
    tiles.append(Tile("Perplexity", shown, "" if seen.perplexity_base is None else gain))
    rounded = facts.rounded_only
    rows = (
        ("base, without the adapter", seen.perplexity_base, facts.bytes_before),
        ("in floats" if rounded else "with the adapter, unfolded", seen.perplexity_before, None),
        ("rounded" if rounded else "folded", seen.perplexity_after, facts.bytes_after),
    )
    columns = (Column("model"), Column("perplexity", "fixed"), Column("weights of these sites", "bytes"))
    table = Table("Perplexity on the calibration inputs.", columns, rows[1:] if rounded else rows)
    return Tiles(tuple(tiles)), table


def where(facts: FoldFacts) -> tuple[Part, ...]:
    """Heat maps of survival and error over depth and kind."""
    charts = [survival_map(facts, "survival", "Share of the update that arrived")]
    worst = {s.fqn: s.relative_error if s.output_error is None else s.output_error for s in facts.sites}
    of = "layer outputs" if any(s.output_error is not None for s in facts.sites) else "weights"
    spots = spots_of(facts, worst)
    if any(worst.values()):
        charts.append(heat_map("error", f"Relative error of the {of}", spots, measure="relative error", good="low"))
    found = [c for c in charts if c is not None]
    if not found:
        return ()
    how = "Bright is good: what arrived, and a small error. Click a square to look its site up in the table."
    return Text((how,)), *found


def survival_map(facts: FoldFacts, name: str, title: str) -> Chart | None:
    """What of each site's update arrived; of untouched sites nothing is shown."""
    shares = {s.fqn: kept(s) for s in facts.sites}
    return heat_map(name, title, spots_of(facts, shares), measure="survival", good="high", whole=True)


def spots_of(facts: FoldFacts, values: dict[str, float | None] | dict[str, float]) -> list[Spot]:
    """Squares of a heat map."""
    places = standings(s.fqn for s in facts.sites)
    return [Spot(s.fqn, places[s.fqn].depth, places[s.fqn].kind, values[s.fqn]) for s in facts.sites]


def _angles(facts: FoldFacts) -> tuple[Part, ...]:
    if facts.rounded_only:
        return ()
    title = "Largest angle of each site's rotation, in degrees"
    spots = spots_of(facts, {s.fqn: s.angle for s in facts.sites})
    chart = heat_map("angle", title, spots, measure="largest angle in degrees", style="angle")
    if chart is None:
        return (Text(("The angles of the rotations were not measured by this fold.",)),)
    return (chart,)


def _drawing(facts: FoldFacts) -> tuple[Part, ...]:
    """The site with the commonest action."""
    if not facts.sites or facts.rounded_only:
        return ()
    commonest = Counter(s.action for s in facts.sites if s.action != "untouched").most_common(1)
    if not commonest:
        return ()
    site = next(s for s in facts.sites if s.action == commonest[0][0])
    before, after = _boxes(site)
    heads = "Before: trained, unfolded", f"After: {site.action}"
    return (Drawing(f"What the fold did to {site.fqn}", (heads[0], before), (heads[1], after)),)


def _boxes(site: SiteFold) -> tuple[tuple[Box, ...], tuple[Box, ...]]:
    name = site.fqn.rpartition(".")[2] or site.fqn
    output = site.side == "output"
    given = Box("ids" if output else "x", role="plain")
    turn = "" if site.angle is None else f"turns up to {site.angle:.3g}°"
    rotation, layer = Box("rotation R", turn, "rotation"), Box(name, f"W, {site.format}")
    inner: tuple[Box, ...] = (layer, rotation) if output else (rotation, layer)
    before = (given, *inner, Box("y", role="plain"))
    if site.action == "kept":
        fixed = Box("R as fixed numbers", "cached, no training", "rotation")
        inner = (layer, fixed) if output else (fixed, layer)
    elif site.action == "into producer":
        inner = (Box("layer before", "its rows turned by R", "changed"), layer)
    else:
        stored = "dense" if site.action in ("dequantized", "folded") and site.format != "dense" else site.format
        inner = (Box(name, f"W' = W {'R' if output else 'Rᵀ'}, {stored}", "changed"),)
    return before, (given, *inner, Box("y", role="plain"))


def origin(provenance: Provenance, adapters: tuple[str, ...], dropped: tuple[str, ...] = ()) -> Terms:
    """Where a fold comes from, name by name; what was not recorded says so."""
    hashes = provenance.hashes
    tokens = provenance.calibration_tokens
    count = provenance.calibration_inputs
    given = f"{count:,} input{'s' if count > 1 else ''}" + ("" if tokens is None else f", {tokens:,} tokens")
    pairs = [
        ("Model", provenance.model),
        *((f"Adapter {n}", f"sha256 {hashes[n]}" if n in hashes else "") for n in adapters),
        *([("Dropped adapters", ", ".join(dropped))] if dropped else []),
        ("Versions", ", ".join(f"{n} {v}" for n, v in provenance.versions.items())),
        ("Command", provenance.command),
        ("Calibration", given if count else "none given" if provenance.versions else ""),
    ]
    return Terms(tuple(pairs))
