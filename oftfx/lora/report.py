"""What became of an adapter as LoRA, measured: per site."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from oftfx.terminal import render

COLUMNS = ("site", "format", "rank", "full rank", "loss %", "error %", "tokens", "note")


@dataclass(frozen=True)
class SiteLora:
    """One site as LoRA.

    Attributes:
        fqn: module path.
        format: how the weight is stored.
        rank: of its factors.
        full_rank: at which nothing is lost.
        loss: ``|X (B A - D)^T|^2 / |X D^T|^2``, the share of the update's energy that is lost, with the update
            ``D = W R^T - W`` and X what the layer reads on the calibration inputs; without them, of ``|D|^2`` itself.
        error: ``|X (B A - D)^T| / |X (W + D)^T|``: the same as a relative error of the layer's output, or its weight.
        tokens: rows of X; None where no input was seen.
        note: what a user should know.
    """

    fqn: str
    format: str
    rank: int
    full_rank: int
    loss: float
    error: float
    tokens: int | None = None
    note: str = ""


@dataclass(frozen=True)
class LoraReport:
    """Iterates over its `SiteLora`; ``print(report)`` shows a summary, ``table()`` every site.

    Attributes:
        path: the directory that was written.
        adapter: which one was converted.
        sites: a row for each.
        parameters: numbers in the factors.

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> report = oftfx.to_lora(model, "lora", rank=4)
        >>> [(site.fqn, site.rank, site.full_rank) for site in report], report.parameters
        ([('0', 4, 4)], 40)
    """

    path: str
    adapter: str
    sites: tuple[SiteLora, ...]
    parameters: int

    def __iter__(self) -> Iterator[SiteLora]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def loss(self) -> float:
        """The largest of all sites."""
        return max(s.loss for s in self.sites)

    def __str__(self) -> str:
        worst = max(self.sites, key=lambda s: s.loss)
        ranks = sorted({s.rank for s in self.sites})
        several = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return (
            f"{self.adapter} as LoRA of rank {several} at {len(self)} sites, {self.parameters:,} numbers, in "
            f"{self.path}: {worst.fqn} loses most of its update, {worst.loss:.2%}"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, as text."""
        return [
            (
                s.fqn,
                s.format,
                str(s.rank),
                str(s.full_rank),
                f"{100 * s.loss:.4f}",
                f"{100 * s.error:.5f}",
                "" if s.tokens is None else f"{s.tokens:,}",
                s.note,
            )
            for s in self.sites
        ]

    def table(self) -> str:
        """One row a site (needs the ``report`` extra)."""
        return render("LoRA", COLUMNS, self.rows()) + str(self) + "\n"

    def to_json(self) -> str:
        """All figures as JSON text."""
        return json.dumps({**asdict(self), "loss": self.loss}, indent=1)
