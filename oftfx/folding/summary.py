"""What a fold's report says in lines of text, and the cells of its table."""

from __future__ import annotations

from collections import Counter

from oftfx.folding.facts import FoldFacts
from oftfx.folding.record import SiteFold

COLUMNS = (
    "site",
    "format",
    "action",
    "update %",
    "error %",
    "output error %",
    "survival %",
    "output survival %",
    "angle °",
    "bytes before",
    "bytes after",
    "note",
)


def actions(facts: FoldFacts) -> str:
    """How many sites each action had."""
    return ", ".join(f"{n} {a}" for a, n in Counter(s.action for s in facts.sites).items()) or "none"


def summary(facts: FoldFacts) -> list[str]:
    """Line by line: the verdict, warnings, what was done, what was measured."""
    worst = max((s.relative_error for s in facts.sites), default=0.0)
    folded, verdict = not facts.rounded_only, facts.verdict
    warned = verdict.state in ("amber", "red", "nothing")  # then the first warning says it
    lines = [
        *([] if warned else [verdict.sentence]),
        *(f"warning: {w}" for w in facts.warnings),
        *(f"not checked: {u}" for u in facts.unchecked),
        f"folded {', '.join(facts.adapters) or 'nothing'} into {len(facts)} sites: {actions(facts)}"
        if folded
        else f"rounded {len(facts)} layers: {actions(facts)}",
        f"worst relative error of a weight {worst:.2e}, weights {facts.bytes_before / 2**20:.1f} MiB before, "
        f"{facts.bytes_after / 2**20:.1f} MiB after",
    ]
    if facts.distilled:
        lines.append(facts.distilled)
    measured = facts.measured
    if measured is not None:
        effect = measured.effect
        against = "" if effect is None else f", where the adapter changes it by {effect:.2e}"
        lines.append(f"relative error of the model's output {measured.output_error:.2e}{against}")
        if measured.perplexity_before is not None:
            base, kept = measured.perplexity_base, measured.gain_kept
            without = "" if base is None else f"{base:.3f} without adapter, "
            share = "" if kept is None else f": {kept:.1%} of the gain is kept"
            lines.append(
                f"perplexity on the calibration inputs {without}{measured.perplexity_before:.3f} "
                f"{'unfolded' if folded else 'in floats'}, {measured.perplexity_after:.3f} "
                f"{'folded' if folded else 'rounded'}{share}"
            )
    if facts.dropped:
        lines.append(f"adapters that did not act and are dropped: {', '.join(facts.dropped)}")
    return lines


def cells(site: SiteFold) -> tuple[str, ...]:
    """A site's row; empty where something was not measured, or there was nothing to fold."""
    still = site.action == "untouched"
    return (
        site.fqn,
        site.format,
        site.action,
        f"{100 * site.update:.3f}",
        f"{100 * site.relative_error:.5f}",
        "" if site.output_error is None else f"{100 * site.output_error:.4f}",
        "" if still else f"{100 * site.survival:.2f}",
        "" if still or site.output_survival is None else f"{100 * site.output_survival:.2f}",
        "" if site.angle is None else f"{site.angle:.3f}",
        f"{site.bytes_before:,}",
        f"{site.bytes_after:,}",
        site.note,
    )
