"""A weight before its fold, and what its rotations make of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FoldError
from oftfx.folding.angles import angles_of
from oftfx.folding.arrived import Arrived, arrived
from oftfx.folding.record import SiteFold
from oftfx.formats.base import WeightFormat
from oftfx.formats.layout import Layout
from oftfx.placement.base import Placement
from oftfx.placement.frozen import product_of
from oftfx.precision import pieces

_EXACTLY = Arrived()


@dataclass(frozen=True, eq=False)
class Turned:
    """What is known of a weight that is to be folded.

    Attributes:
        fqn: path of its site.
        placement: its rotations.
        format: how it is stored.
        layout: which axis of it they turn.
        base: the weight as it is, ``(out, in)``.
        chain: blocks, in the order in which they act.
        target: the weight turned by them.
        update: relative size of ``target - base``.
        energy: ``|target - base|^2``.
        before: bytes of the weight.
        note: for the report.
    """

    fqn: str
    placement: Placement
    format: WeightFormat
    layout: Layout
    base: Tensor
    chain: list[Tensor]
    target: Tensor
    update: float
    energy: float
    before: int
    note: str

    @classmethod
    def of(
        cls, fqn: str, placement: Placement, weight_format: WeightFormat, note: str = "", *, always: bool = False
    ) -> Turned | None:
        """The weight of a site and what it becomes; unless ``always``, None where its rotation is exactly the identity.

        Raises:
            FoldError: the rotated weight is not finite.
        """
        module, chain = placement.module, product_of(placement.in_effect())
        if not always and all(is_identity(b) for b in chain):
            return None
        base = weight_format.borrow(module)
        layout = weight_format.layout(module)
        chain = [b.to(base.device) for b in chain]
        target = layout.turned_now(base, chain)
        parts = [torch.linalg.vector_norm(part) for t, b in pieces(target, base) for part in (t - b, b)]
        difference, size = torch.linalg.vector_norm(torch.stack(parts).double().view(-1, 2), dim=0).tolist()
        update = share(difference, size)
        if not math.isfinite(update):
            raise FoldError(f"{fqn}: the rotated weight is not finite; look at the adapter's values there")
        before = weight_format.nbytes(module)
        return cls(fqn, placement, weight_format, layout, base, chain, target, update, difference**2, before, note)

    @property
    def module(self) -> nn.Module:
        """The layer."""
        return self.placement.module

    def turned(self, weight: Tensor) -> Tensor:
        """Another weight of this layer, turned as its own."""
        return self.layout.turned_now(weight, self.chain)

    def arrived(self, weight_format: WeightFormat, module: nn.Module, moments: Tensor | None = None) -> Arrived:
        """What a layer that was written has got of the update."""

        def parts() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for rows, folded in weight_format.rows(module):
                for some in pieces(folded.to(self.base.device), self.target[rows], self.base[rows]):
                    yield some[0], some[1], some[2]

        return arrived(parts(), moments)

    def line(
        self,
        action: str,
        after: int,
        got: Arrived = _EXACTLY,
        *,
        note: str | None = None,
    ) -> SiteFold:
        """The site's line of the report."""
        angle, typical = angles_of(self.chain)
        return SiteFold(
            fqn=self.fqn,
            format=self.format.name,
            action=action,
            update=self.update,
            energy=self.energy,
            relative_error=got.error,
            survival=got.survival,
            bytes_before=self.before,
            bytes_after=after,
            note=self.note if note is None else note,
            output_error=got.output_error,
            output_survival=got.output_survival,
            angle=angle,
            typical_angle=typical,
            side=self.layout.side,
        )

    def check_finite(self, got: Arrived, dtype: torch.dtype) -> None:
        """Refuse a weight that its dtype cannot hold.

        Raises:
            FoldError: the error of what was written is not finite.
        """
        if not math.isfinite(got.error):
            raise FoldError(f"{self.fqn}: the rotated weight overflows {dtype}; fold in a wider dtype")


def untouched(fqn: str, placement: Placement, weight_format: WeightFormat) -> SiteFold:
    """The line of a site whose rotation is exactly the identity; the rotation goes, the weight stays bit for bit."""
    nbytes = weight_format.nbytes(placement.module)
    placement.drop()
    return SiteFold(fqn, weight_format.name, "untouched", bytes_before=nbytes, bytes_after=nbytes)


def norm(parts: Iterable[Tensor]) -> float:
    """Frobenius norm of a weight that comes in parts, each small enough for float32 to be good to six digits."""
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p) for p in parts]).double()))


def share(part: float, whole: float) -> float:
    """``part / whole``; a weight of zeros stays zeros under any rotation."""
    return part / whole if whole else part


def is_identity(blocks: Tensor) -> bool:
    """Exactly."""
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return bool((blocks == eye).all())
