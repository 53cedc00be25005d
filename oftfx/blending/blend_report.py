"""What a blend did, measured: per rotation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from oftfx.terminal import render

COLUMNS = ("site", "blocks", "size", "adapters", "largest angle °", "left out %", "rounding", "note")


@dataclass(frozen=True)
class SiteBlend:
    """What a blend did to one rotation.

    Attributes:
        fqn: module path of the site that holds it.
        blocks: their number.
        block_size: their size.
        adapters: those that rotate this site.
        identity: those that do not.
        largest_angle: of the result, in radians.
        departure: the most by which a block of an adapter stretches a vector, which is left out; 0.01 is one percent.
        error: ``|R - exp(L)|`` of a block, Frobenius, the largest: what rounding the skew to its dtype has cost.
        note: what a user should know.
    """

    fqn: str
    blocks: int
    block_size: int
    adapters: tuple[str, ...]
    identity: tuple[str, ...]
    largest_angle: float
    departure: float
    error: float
    note: str = ""


@dataclass(frozen=True)
class BlendReport:
    """Iterates over its `SiteBlend`; ``print(report)`` shows a summary, ``table()`` every rotation.

    Attributes:
        adapter: name of the new adapter.
        weights: of the adapters that it is made of.
        sites: a row for each rotation.

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3)}, adapter="news")
        >>> plan = oftfx.add_adapter(model, "code", {"*": oftfx.OFT(2)})
        >>> report = oftfx.blend(model, {"news": 0.5, "code": 0.5}, into="both")
        >>> [(site.fqn, site.block_size, site.note) for site in report]
        [('0', 6, 'blocks of 2, 3 are inside blocks of 6')]
    """

    adapter: str
    weights: tuple[tuple[str, float], ...]
    sites: tuple[SiteBlend, ...]

    def __iter__(self) -> Iterator[SiteBlend]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def departure(self) -> float:
        """The largest of all rotations."""
        return max((s.departure for s in self.sites), default=0.0)

    def __str__(self) -> str:
        parts = " + ".join(f"{weight:g} {name}" for name, weight in self.weights)
        largest = max((s.largest_angle for s in self.sites), default=0.0)
        error = max((s.error for s in self.sites), default=0.0)
        return (
            f"{self.adapter} = {parts}: {len(self)} rotations, by {math.degrees(largest):.2f} degrees at most; "
            f"left out {self.departure:.2e} (what stretches), rounding {error:.1e}"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, as text."""
        return [
            (
                s.fqn,
                str(s.blocks),
                str(s.block_size),
                ", ".join(s.adapters),
                f"{math.degrees(s.largest_angle):.3f}",
                f"{100 * s.departure:.5f}",
                f"{s.error:.1e}",
                s.note,
            )
            for s in self.sites
        ]

    def table(self) -> str:
        """One row a rotation (needs the ``report`` extra)."""
        return render("Blend", COLUMNS, self.rows()) + str(self) + "\n"

    def to_json(self) -> str:
        """All figures as JSON text."""
        return json.dumps(asdict(self), indent=1)
