"""Codes of a calibrated fold on a rotated model, and the scales that are distilled for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn

from oftfx.adapter.before_fold import own_copy
from oftfx.adapter.fingerprint import fingerprint
from oftfx.adapter.store import located
from oftfx.errors import FoldError
from oftfx.folding.aware import forget_all, make_all_aware, quantized_sites, scales
from oftfx.folding.distil import distil
from oftfx.folding.note import fold_notes
from oftfx.folding.record import SiteFold
from oftfx.formats.registry import format_of
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes
from oftfx.passes.fold_rotations import FoldRotations
from oftfx.placement.find import rotated_sites
from oftfx.planning.program import Program

ROUNDED = ("calibrated", "requantized", "from reference", "from reference, calibrated")
"""What a fold says of sites whose codes are new, those that no calibration input has reached among them."""


@dataclass(frozen=True)
class Distilled:
    """What came of it.

    Attributes:
        lines: of the calibrated fold, of the sites whose scales were trained.
        before: loss of the calibrated fold on what was held out.
        after: with the scales that were kept.
        held_out: inputs that were.
    """

    lines: Mapping[str, SiteFold]
    before: float
    after: float
    held_out: int

    def __str__(self) -> str:
        where = f"{self.held_out} inputs that were held out" if self.held_out else "the calibration inputs themselves"
        return (
            f"scales of {len(self.lines)} sites distilled: divergence {self.before:.4g} -> {self.after:.4g} on {where}"
        )


def calibrated_codes(
    root: nn.Module, names: Sequence[str], fold: FoldRotations
) -> tuple[dict[str, Codes], dict[str, SiteFold]]:
    """What a calibrated fold of these adapters writes, with its lines; the model stays as it is."""
    trial = own_copy(root)
    located(trial)[1].activate(trial, tuple(names))
    forget_all(trial)
    placements = dict(rotated_sites(trial))
    sites = {fqn: (placement.module, placement.weight_format()) for fqn, placement in placements.items()}
    codes, lines = dict[str, Codes](), dict[str, SiteFold]()
    for line in fold.run(Program.of(trial)).found.sites:
        layer, weight_format = sites[line.fqn]
        if line.action in ROUNDED and isinstance(weight_format, ScalarFormat):
            codes[line.fqn], lines[line.fqn] = weight_format.codes(layer), line
    return codes, lines


def folded_codes(
    root: nn.Module, names: Sequence[str], before: nn.Module | None, model: nn.Module, report: Iterable[SiteFold]
) -> dict[str, Codes]:
    """The codes that a calibrated fold of these adapters has written into a model.

    Args:
        root: rotated, with these adapters.
        names: of the adapters.
        before: what was folded, where it is known.
        model: the folded model.
        report: of the fold.

    Raises:
        FoldError: it was made for other values of the adapters, or of another base.
    """
    if before is None:
        raise FoldError(
            "fold_aware: this fold kept nothing of the model before it, so nobody can tell whether it is of this one. "
            "Fold without inplace= and undo=, or give calibration inputs"
        )
    wanted = {name: fingerprint(root, name) for name in names}
    notes = [n for n in fold_notes(model) if not n["module"]]
    if not notes or notes[-1]["adapters"] != wanted:
        raise FoldError(
            f"fold_aware: this fold was made of other adapters, or of other values, than {', '.join(names)} has now. "
            "Fold again, or give calibration inputs"
        )
    found = dict[str, Codes]()
    for line in report:
        layer = model.get_submodule(line.fqn)
        weight_format = format_of(layer)
        is_new = line.action.removesuffix(", distilled") in (*ROUNDED, "as trained")
        if not is_new or not isinstance(weight_format, ScalarFormat):
            continue
        if not _same_weight(root.get_submodule(line.fqn), before.get_submodule(line.fqn)):
            raise FoldError(
                f"fold_aware: {line.fqn} has another weight than the model that was folded. Fold this one, or give "
                "calibration inputs"
            )
        found[line.fqn] = weight_format.codes(layer)
    return found


def _same_weight(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers store the same values the same way."""
    first, second = format_of(one), format_of(other)
    if type(first) is not type(second) or not isinstance(first, ScalarFormat):
        return False
    return torch.equal(first.dequantize(one), first.dequantize(other))


def distil_scales(
    root: nn.Module,
    names: Sequence[str],
    fold: FoldRotations,
    passes: int,
    progress: bool | Callable[[int, int], None] = False,
) -> Distilled:
    """Let the sites of a model compute with a calibrated fold whose scales have learnt to give its unfolded outputs.

    Raises:
        FoldError: the policy calibrates nothing that has scales.
    """
    codes, lines = calibrated_codes(root, names, fold)
    sites = [s for s in quantized_sites(root, names) if s[0] in codes]
    if not sites:
        raise FoldError(
            "distil: nothing is rounded, so there are no scales to train: the policy rounds no site, or every rotation "
            "is exactly the identity. Leave distil=0"
        )
    make_all_aware(sites, scales(codes))
    before, after, held = distil(root, fold.calibration, passes, progress=progress)
    return Distilled(lines, before, after, held)
