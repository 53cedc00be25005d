"""Where sites stand in a model: at what depth, and which of a layer's parts they are."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from oftfx.planning.plan_table import pattern, ranges


@dataclass(frozen=True)
class Standing:
    """Of one site.

    Attributes:
        depth: the first number in its path; None where there is none, as of an output head.
        kind: the shortest end of its path that tells the kinds apart, ``"q_proj"``.
        group: the paths of its kind in one, ``"model.layers.{0..29}.self_attn.q_proj"``.
    """

    depth: int | None
    kind: str
    group: str


def standings(paths: Iterable[str]) -> dict[str, Standing]:
    """Depth and kind of every site, by its path.

    Examples:
        >>> found = standings(["layers.0.attn.q", "layers.0.up", "layers.1.attn.q", "layers.1.up", "head"])
        >>> found["layers.1.attn.q"]
        Standing(depth=1, kind='q', group='layers.{0..1}.attn.q')
        >>> found["head"]
        Standing(depth=None, kind='head', group='head')
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        alike[pattern(path)].append(path)
    kinds = _short([*alike])
    found = {}
    for key, members in alike.items():
        group = ranges(members)
        for path in members:
            number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
            found[path] = Standing(int(number[1]) if number else None, kinds[key], group)
    return found


def _short(patterns: list[str]) -> dict[str, str]:
    """For each pattern the shortest end that no other one has, without its open numbers where it stays clear."""
    words = {p: [w for w in p.split(".") if w != "{}"] or [p] for p in patterns}
    clear = len({tuple(w) for w in words.values()}) == len(words)
    if not clear:
        words = {p: p.split(".") for p in patterns}
    short = {}
    for one, mine in words.items():
        others = [w for p, w in words.items() if p != one]
        length = next((n for n in range(1, len(mine)) if not any(o[-n:] == mine[-n:] for o in others)), len(mine))
        end = mine[-length:]
        short[one] = ".".join(end if len(end) <= 3 else [end[0], "…", *end[-2:]])
    short = {p: "layer" if s == "{}" else s for p, s in short.items()}
    return short if len(set(short.values())) == len(short) else {p: ".".join(w) for p, w in words.items()}
