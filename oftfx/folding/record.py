"""What a fold did to a site, and what it takes to undo it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.nn as nn

from oftfx.formats.base import WeightFormat, WeightState
from oftfx.formats.exact import is_exact, is_fast, is_own_anywhere, use_exact
from oftfx.model.structure import replace_module
from oftfx.placement.aware import CHILD as AWARE
from oftfx.placement.aware import Aware, make_aware
from oftfx.placement.base import Placement, SiteRotations
from oftfx.rotation.frozen import FrozenRotation
from oftfx.rotation.module import Rotation


@dataclass(frozen=True)
class SiteFold:
    """What a fold did to one site.

    Attributes:
        fqn: module path.
        format: weight format before the fold.
        action: ``"folded"`` (float weight rotated), ``"kept"`` (quantized weight untouched, rotation in front),
            ``"requantized"``, ``"calibrated"``, ``"from reference"`` (and ``", calibrated"``; either may be followed by
            ``", distilled"``), ``"as trained"`` (the codes and scales that fold-aware training has computed with),
            ``"dequantized"`` (now a float layer), ``"untouched"`` (the rotation was the identity) or
            ``"into producer"`` (this weight untouched, the rows of the layer before it turned).
        update: ``|W_target - W| / |W|``, how far the rotation moved the weight.
        energy: ``|W_target - W|^2``, the weight of this site in `FoldReport.survival`.
        relative_error: ``|W_folded - W_target| / |W_target|``, Frobenius; 0 where nothing was rounded.
        survival: ``<W_folded - W, W_target - W> / |W_target - W|^2``, the share of the update that arrived.
        bytes_before: size of the stored weight.
        bytes_after: the same afterwards, with a rotation that stays in front.
        note: what a user should know.
        output_error: ``|X (W_folded - W_target)^T| / |X W_target^T|`` on the calibration inputs X that the layer read.
            Of a calibrated site ``|X~ W_folded^T - X W_target^T| / |X W_target^T|`` on inputs that were held out: X~ is
            what the layer reads after the layers before it were folded, X what it reads in the unfolded model. None
            where no inputs were seen.
        output_survival: the same as ``survival`` for these outputs; what error-compensated rounding keeps, which moves
            weights for its sake.
        tokens: rows of calibration inputs that the layer read, where it was calibrated.
        few_tokens: whether these are few for its width.
        angle: largest angle by which a block of its rotation turns, in degrees; None where it is not known.
        typical_angle: root mean square of all its angles.
        side: ``"output"`` where the rotation acts on what the layer gives, as of an embedding; else ``"input"``.
    """

    fqn: str
    format: str
    action: str
    update: float = 0.0
    energy: float = 0.0
    relative_error: float = 0.0
    survival: float = 1.0
    bytes_before: int = 0
    bytes_after: int = 0
    note: str = ""
    output_error: float | None = None
    output_survival: float | None = None
    tokens: int | None = None
    few_tokens: bool = False
    angle: float | None = None
    typical_angle: float | None = None
    side: str = "input"


@dataclass(frozen=True)
class Folds:
    """What a pass folded.

    Attributes:
        sites: one line a site.
        left: for sites that were left to another pass, the reason.
    """

    sites: tuple[SiteFold, ...]
    left: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Undo:
    """What a site was before the fold: the layer object, its weight, its rotations."""

    placement: Placement
    module: nn.Module
    format: WeightFormat
    state: WeightState
    fixed: tuple[FrozenRotation, ...]
    rotations: Mapping[str, Rotation]
    active: tuple[str, ...]
    holder: nn.Module | None
    path: str
    exact: bool
    fast: bool
    anywhere: bool
    through: Mapping[tuple[str, ...], Aware]

    @classmethod
    def of(cls, path: str, placement: Placement, weight_format: WeightFormat) -> Undo:
        """The state of a site now; ``path`` is that of its module."""
        holder = placement.holder
        if holder is not None:  # a shell of its own: folding empties the original
            shell = SiteRotations(placement)
            shell._modules.update((n, m) for n, m in holder._modules.items() if n != AWARE)
            shell.training, holder = holder.training, shell
        return cls(
            placement,
            placement.module,
            weight_format,
            weight_format.read(placement.module),
            tuple(placement.fixed),
            dict(placement.rotations),
            tuple(placement.active),
            holder,
            path,
            is_exact(placement.module),
            is_fast(placement.module),
            is_own_anywhere(placement.module),
            dict(placement.through),
        )

    def restore(self, model: nn.Module) -> None:
        """Bring the site back: the same bytes, the same rotations."""
        placement, module = self.placement, self.module
        now = model.get_submodule(self.path)
        if now is not module:
            replace_module(model, now, module)
        placement.drop()
        self.format.write(module, self.state)
        if self.exact:
            use_exact(module, fast=self.fast, anywhere=self.anywhere)
        if self.holder is not None:
            module._modules[placement.child] = self.holder
        placement.fixed, placement.rotations, placement.active = list(self.fixed), dict(self.rotations), self.active
        for aware in self.through.values():
            make_aware(placement, aware)
        placement.forget()
        placement.register()
