"""The angles that an adapter turns by."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn

from oftfx.adapter.store import located
from oftfx.blending.turns import rotations_of, turn_of
from oftfx.errors import AdapterError
from oftfx.rotation.logarithm import angles_of
from oftfx.terminal import render

COLUMNS = ("site", "blocks", "size", "largest °", "median °", "rms °", "departure %")


@dataclass(frozen=True)
class SiteAngles:
    """The angles of one site.

    Attributes:
        fqn: module path.
        owner: the site that holds the rotation; another one where sites share it.
        angles: for each block the angles of its eigenvalues in radians, in [0, pi], ascending. Eigenvalues of a
            rotation are in conjugate pairs, so the angle of each plane is there twice; an odd block has a zero.
        departure: how far the blocks are from rotations: the most by which one stretches a vector. The angles are those
            of the nearest rotation.
    """

    fqn: str
    owner: str
    angles: tuple[tuple[float, ...], ...]
    departure: float

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.angles)

    @property
    def block_size(self) -> int:
        """Their size."""
        return len(self.angles[0])

    @property
    def largest(self) -> float:
        """The largest angle."""
        return max(a[-1] for a in self.angles)

    @property
    def median(self) -> float:
        """Of all angles."""
        return float(torch.tensor(self.angles, dtype=torch.float64).median())

    @property
    def norm(self) -> float:
        """``|log R|``, Frobenius: the length of the way from the identity."""
        return math.sqrt(math.fsum(a * a for block in self.angles for a in block))

    @property
    def rms(self) -> float:
        """Root of the mean square of all angles."""
        return self.norm / math.sqrt(self.blocks * self.block_size)


@dataclass(frozen=True)
class AngleReport:
    """Iterates over its `SiteAngles`; ``report["path"]`` is one site's, ``table()`` shows all.

    Attributes:
        adapter: whose.
        sites: in the order of the model.

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(2, parameterization="cayley")})
        >>> skew = model[0].oft.default.skew.data.fill_(1.0)  # tan(pi / 4) for each block
        >>> [round(angle, 6) for angle in oftfx.rotation_angles(model)["0"].angles[0]]
        [1.570796, 1.570796]
    """

    adapter: str
    sites: tuple[SiteAngles, ...]

    def __iter__(self) -> Iterator[SiteAngles]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, fqn: str) -> SiteAngles:
        for site in self.sites:
            if site.fqn == fqn:
                return site
        raise KeyError(fqn)

    def __str__(self) -> str:
        worst = max(self.sites, key=lambda s: s.largest)
        return f"{self.adapter}: {len(self)} sites, by {math.degrees(worst.largest):.3f} degrees at most ({worst.fqn})"

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, as text."""
        return [
            (
                s.fqn,
                str(s.blocks),
                str(s.block_size),
                *(f"{math.degrees(a):.3f}" for a in (s.largest, s.median, s.rms)),
                f"{100 * s.departure:.5f}",
            )
            for s in self.sites
        ]

    def table(self) -> str:
        """One row a site (needs the ``report`` extra)."""
        return render("Angles", COLUMNS, self.rows()) + str(self) + "\n"

    def to_json(self) -> str:
        """All angles as JSON text."""
        return json.dumps(asdict(self), indent=1)


def rotation_angles(model: nn.Module, adapter: str = "default") -> AngleReport:
    """The angles by which an adapter turns, for each block of each site, in float64.

    Args:
        model: a transformed model; it is not changed, and no weight is looked at.
        adapter: its name.

    Raises:
        AdapterError: an unknown name, or numbers that are not finite.

    Examples:
        >>> import oftfx, torch
        >>> model = oftfx.transform(torch.nn.Sequential(torch.nn.Linear(6, 4)), {"*": oftfx.OFT(3, init="normal")})
        >>> report = oftfx.rotation_angles(model)
        >>> [(site.fqn, site.blocks, site.block_size, site.angles[0][0] < 1e-9) for site in report]
        [('0', 2, 3, True)]
    """
    root, store = located(model)
    known: dict[int, tuple[str, tuple[tuple[float, ...], ...], float]] = {}
    sites = []
    for fqn, rotation in rotations_of(root, store, adapter).items():
        if id(rotation) not in known:
            turn, departure = turn_of(rotation, fqn, adapter)
            known[id(rotation)] = fqn, tuple(map(tuple, angles_of(turn).tolist())), departure
        sites.append(SiteAngles(fqn, *known[id(rotation)]))
    if not sites:
        raise AdapterError(f"adapter {adapter!r} has no rotation left in this model")
    return AngleReport(adapter, tuple(sites))
