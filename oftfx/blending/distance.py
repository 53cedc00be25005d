"""How far two adapters are apart, along the manifold of rotations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.store import located
from oftfx.blending.turns import rotations_of, turn_of
from oftfx.rotation.logarithm import angles_of, joined
from oftfx.rotation.module import Rotation
from oftfx.terminal import render

COLUMNS = ("site", "size", "|log a|", "|log b|", "distance", "relative")


@dataclass(frozen=True)
class SiteDistance:
    """Two rotations of one site.

    Attributes:
        fqn: module path.
        block_size: of the blocks in which they are compared.
        first: ``|log R_a|``, the length of the way from the identity to the first; 0 where it does not rotate here.
        second: of the second.
        distance: ``|log(R_a^T R_b)|``, Frobenius: the length of the shortest way from one to the other, in radians.
    """

    fqn: str
    block_size: int
    first: float
    second: float
    distance: float

    @property
    def relative(self) -> float:
        """``distance / (first + second)``: 0 for equal rotations, 1 where the way leads over the identity."""
        return _share(self.distance, self.first + self.second)


@dataclass(frozen=True)
class DistanceReport:
    """Iterates over its `SiteDistance`; ``report["path"]`` is one site's, ``table()`` shows all.

    Attributes:
        adapters: the two.
        sites: those that either rotates: of the first one, then those of the second alone.

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal", parameterization="cayley")}, adapter="a")
        >>> report = oftfx.blend(model, {"a": -1.0}, into="inverse")
        >>> distance = oftfx.adapter_distance(model, "a", "inverse")
        >>> round(distance.relative, 5), round(distance.distance / distance["0"].first, 4)
        (1.0, 2.0)
    """

    adapters: tuple[str, str]
    sites: tuple[SiteDistance, ...]

    def __iter__(self) -> Iterator[SiteDistance]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, fqn: str) -> SiteDistance:
        for site in self.sites:
            if site.fqn == fqn:
                return site
        raise KeyError(fqn)

    @property
    def distance(self) -> float:
        """Of all sites together: the root of the sum of squares."""
        return math.hypot(*(s.distance for s in self.sites))

    @property
    def relative(self) -> float:
        """``distance`` over the sum of both adapters' own lengths."""
        whole = math.hypot(*(s.first for s in self.sites)) + math.hypot(*(s.second for s in self.sites))
        return _share(self.distance, whole)

    def __str__(self) -> str:
        a, b = self.adapters
        return (
            f"{a} to {b}: {self.distance:.4g} rad over {len(self)} sites, {self.relative:.1%} of the way over the base"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, as text."""
        return [
            (s.fqn, str(s.block_size), *(f"{v:.5f}" for v in (s.first, s.second, s.distance, s.relative)))
            for s in self.sites
        ]

    def table(self) -> str:
        """One row a site (needs the ``report`` extra)."""
        return render("Distance", COLUMNS, self.rows()) + str(self) + "\n"

    def to_json(self) -> str:
        """All figures as JSON text."""
        sites = [{**asdict(s), "relative": s.relative} for s in self.sites]
        whole = {"adapters": self.adapters, "distance": self.distance, "relative": self.relative}
        return json.dumps({**whole, "sites": sites}, indent=1)


def adapter_distance(model: nn.Module, first: str, second: str) -> DistanceReport:
    """The geodesic distance ``|log(R_a^T R_b)|`` of two adapters at each site, in float64.

    What either rotates is compared; the other is the identity there. Blocks of different sizes are compared inside
    blocks that hold both. Of blocks that are no exact rotations (``cayley_neumann``) the nearest ones are compared.
    What trains whole is not.

    Args:
        model: a transformed model; it is not changed.
        first: an adapter.
        second: another one, or the same.

    Raises:
        AdapterError: an unknown name, or numbers that are not finite.

    Source: the bi-invariant metric of SO(n); Moakher, SIAM J. Matrix Anal. Appl. 24 (2002).

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")}, adapter="a")
        >>> report = oftfx.adapter_distance(model, "a", "a")
        >>> round(report.distance, 6), report["0"].first > 0
        (0.0, True)
    """
    root, store = located(model)
    a, b = rotations_of(root, store, first), rotations_of(root, store, second)
    known: dict[tuple[int, int], tuple[int, float, float, float]] = {}
    sites = []
    for fqn in dict.fromkeys((*a, *b)):
        key = id(a.get(fqn)), id(b.get(fqn))
        if key not in known:
            known[key] = _between(a.get(fqn), b.get(fqn), fqn, (first, second))
        sites.append(SiteDistance(fqn, *known[key]))
    return DistanceReport((first, second), tuple(sites))


def _between(
    a: Rotation | None, b: Rotation | None, fqn: str, names: tuple[str, str]
) -> tuple[int, float, float, float]:
    size = math.lcm(*(r.block_size for r in (a, b) if r is not None))
    turns = [None if r is None else joined(turn_of(r, fqn, n)[0], size) for r, n in zip((a, b), names, strict=True)]
    first, second = (0.0 if t is None else _length(t) for t in turns)
    if turns[0] is None or turns[1] is None:
        return size, first, second, first + second
    return size, first, second, _length(turns[0].mT @ turns[1])


def _length(rotations: Tensor) -> float:
    return float(torch.linalg.vector_norm(angles_of(rotations)))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
