"""Put fold-aware weights on the sites of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch.nn as nn

from oftfx.errors import FoldError
from oftfx.folding.reference import ReferenceWeights
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes
from oftfx.placement.aware import Aware, forget_aware, make_aware
from oftfx.placement.aware_nearest import AwareNearest
from oftfx.placement.aware_scales import AwareScales
from oftfx.placement.base import Placement
from oftfx.placement.find import rotated_sites
from oftfx.placement.input import RotateInput

Maker = Callable[[str, Placement, tuple[str, ...]], Aware | None]
"""Of a site's path, its placement, and the names that act there, what is to stand there; None: its rotations."""


def quantized_sites(root: nn.Module, names: Sequence[str]) -> list[tuple[str, Placement, tuple[str, ...]]]:
    """The sites where these adapters act before a quantized weight, with those that do.

    Raises:
        FoldError: one of them cannot be trained through its fold; the message says why.
    """
    found = []
    for fqn, placement in rotated_sites(root):
        weight_format, here = placement.weight_format(), tuple(n for n in names if n in placement.rotations)
        if not here or weight_format is None or weight_format.lossless:
            continue
        reason = _unfit(placement, here, isinstance(weight_format, ScalarFormat))
        if reason:
            raise FoldError(f"{fqn} ({weight_format.name}) cannot be trained through its fold: {reason}")
        found.append((fqn, placement, here))
    return found


def _unfit(placement: Placement, names: Sequence[str], scalar: bool) -> str:
    if not scalar:
        return "its format stores no code for each weight. Exclude it by a rule, or use fold(quantized='calibrate')"
    if not isinstance(placement, RotateInput) or placement.axis != -1:
        return f"a {type(placement.module).__name__} does not multiply its input's last axis. Exclude it by a rule"
    if placement.fixed:
        return "an earlier fold has left a fixed rotation in front of it, which would stay. Begin from the base"
    if any(placement.rotations[n].dropout is not None for n in names):
        return "its rotation drops blocks, which no fold does; set dropout=0"
    return ""


def make_all_aware(sites: Sequence[tuple[str, Placement, tuple[str, ...]]], make: Maker) -> int:
    """Let sites compute with what their fold will write; all or, where one fails, none. Returns how many."""
    made = [(placement, make(fqn, placement, names)) for fqn, placement, names in sites]
    for placement, aware in made:
        if aware is not None:
            make_aware(placement, aware)
    return sum(aware is not None for _, aware in made)


def nearest(reference: ReferenceWeights | None) -> Maker:
    """`AwareNearest` of the layers' own weights, or of the original ones."""

    def make(fqn: str, placement: Placement, names: tuple[str, ...]) -> Aware:
        if reference is None:
            return AwareNearest(placement, names)
        shape = placement.weight_format().geometry(placement.module)  # type: ignore[union-attr]
        return AwareNearest(placement, names, partial(reference.weight, fqn, (shape.out_features, shape.in_features)))

    return make


def scales(folded: Mapping[str, Codes]) -> Maker:
    """`AwareScales` that start from these codes; sites without stay as they are."""

    def make(fqn: str, placement: Placement, names: tuple[str, ...]) -> Aware | None:
        return AwareScales(placement, names, folded[fqn]) if fqn in folded else None

    return make


def forget_all(root: nn.Module, names: Sequence[str] | None = None) -> None:
    """Rotations act again everywhere: where just these adapters do, or any."""
    for _, placement in list(rotated_sites(root)):
        here = None if names is None else tuple(n for n in names if n in placement.rotations)
        if here is None:
            forget_aware(placement)
        elif here in placement.through:
            forget_aware(placement, exactly=here)
