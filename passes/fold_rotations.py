"""Put rotations into the weights: ``W' = W @ blockdiag(R)^T``, and measure what arrived."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn as nn

from oftfx.errors import FoldError, OftfxWarning, PassError
from oftfx.folding.lockstep import Inputs, Lockstep
from oftfx.folding.moments import Moments
from oftfx.folding.policies import Budget, Policy, check_policy, choices
from oftfx.folding.record import SiteFold, Undo
from oftfx.folding.reference import ReferenceWeights
from oftfx.formats.base import WeightFormat
from oftfx.model.huggingface import Untied
from oftfx.model.site import Site
from oftfx.passes.fold_site import SiteFolder
from oftfx.passes.protocol import Change, Pass, PassResult
from oftfx.placement.base import Placement
from oftfx.placement.find import rotated_sites
from oftfx.placement.input import RotateInput
from oftfx.planning.program import Program
from oftfx.rotation.module import Rotation

_NEVER_RAN = (
    "this layer has never been called while others have, so its rotation may not be part of what the model computed "
    "(its weight may be used by other code); compare folded and unfolded outputs, or exclude it by a rule"
)
_NOT_REACHED = "no calibration input reached this layer, or only zeros, so its weights are rounded to the nearest codes"


class FoldRotations(Pass):
    """Fold every site of the model in place.

    A float weight takes its rotation exactly, computed in float32 (float64 for float64) blockwise and rounded once.
    A quantized one follows the policy; see `oftfx.fold`. A weight whose rotation is exactly the identity is never
    touched.

    Sites that are calibrated come last, in the order in which the model runs them: each sees what the layers before it
    have become. See `oftfx.folding.lockstep`.

    Args:
        quantized: a policy, or a function from `Site` to one.
        calibration: inputs of the model, for error-compensated rounding.
        reference: original float weights, for that policy.
        progress: called with (sites done, all sites) after each.

    Attributes:
        sites: one `SiteFold` a site, after ``run``.
        undo: what it takes to bring each site back, after ``run``.
    """

    name = "fold_rotations"
    preserves = "lossy"  # per site; exact and rounding ones are in the report
    after = ("insert_rotations",)

    def __init__(
        self,
        quantized: Policy = "keep",
        *,
        calibration: Sequence[Inputs] = (),
        reference: ReferenceWeights | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if not callable(quantized) or isinstance(quantized, Budget):
            check_policy(quantized, "quantized")
        self.quantized, self.calibration, self.reference = quantized, tuple(calibration), reference
        self.progress = progress
        self.sites: list[SiteFold] = []
        self.undo: list[Undo | Untied] = []

    def run(self, program: Program) -> PassResult:
        """Fold, site by site.

        Raises:
            FoldError: an unknown policy, or one without what it needs; a weight that is not finite; a layer that does
                not compute ``x @ W^T``.
        """
        model, sites = program.model, {s.fqn: s for s in program.sites}
        todo = [_Todo(fqn, p, self._format(fqn, p), self._policy(sites, fqn)) for fqn, p in rotated_sites(model)]
        for one in todo:  # before anything changes
            self._check(one)
        folder = SiteFolder(model, _shared(model), self.undo, self.reference)
        some_ran = any(t.placement.ran for t in todo)
        remarks = {t.fqn: _NEVER_RAN if some_ran and not t.placement.ran else _later_hooks(t.placement) for t in todo}
        done: dict[str, SiteFold] = {}

        def fold(one: _Todo, moments: torch.Tensor | None = None, remark: str = "") -> None:
            path = folder.paths[one.placement.module]
            self.undo.append(Undo.of(path, one.placement, one.format))
            result = folder.fold(one.fqn, one.placement, one.format, one.policy, moments)
            rounded = result.action in ("requantized", "from reference")
            remark = "; ".join(r for r in (remark if rounded else "", remarks[one.fqn]) if r)
            if remark:
                result = replace(result, note="; ".join(n for n in (result.note, remark) if n))
                warnings.warn(f"{one.fqn}: {remark}", OftfxWarning, stacklevel=4)
            done[one.fqn] = result
            if self.progress is not None:
                self.progress(len(done), len(todo))

        later = [t for t in todo if self._is_calibrated(t)]
        for one in todo:
            if one not in later:
                fold(one)
        self._calibrate(model, later, fold)
        folder.finish()
        self.sites = [done[t.fqn] for t in todo]
        changes = tuple(Change(s.fqn, s.action, s.note) for s in self.sites)
        return PassResult(program.with_(sites=Program.of(model).sites), bool(todo), changes)

    def _calibrate(self, model: nn.Module, todo: Sequence[_Todo], fold: Callable[..., None]) -> None:
        if not todo:
            return
        by_module, moments = {t.placement.module: t for t in todo}, Moments()

        def show(module: nn.Module, inputs: list[torch.Tensor]) -> None:
            seen = moments.of(inputs)
            if seen.any():
                fold(by_module[module], seen)
            else:  # no rows (an expert that got no tokens), or zeros only: every rounding would look perfect
                fold(by_module[module], None, _NOT_REACHED)

        for module in Lockstep(model, list(by_module)).run(self.calibration, show):
            fold(by_module[module], None, _NOT_REACHED)

    def _is_calibrated(self, one: _Todo) -> bool:
        if one.format.lossless or not self.calibration:
            return False
        # A budget measures output errors where it can.
        return isinstance(one.policy, Budget) or one.policy in ("calibrate", "reference")

    def _check(self, one: _Todo) -> None:
        if one.format.lossless:
            return
        if choices(one.policy)[-1] == "calibrate" and not self.calibration:  # a budget passes it over, but for its last
            raise FoldError(
                f"{one.fqn}: policy 'calibrate' needs calibration=, an iterable of model inputs (some dozens of "
                "sequences of real text, say)"
            )
        if "reference" in choices(one.policy) and self.reference is None:
            raise FoldError(
                f"{one.fqn}: policy 'reference' needs reference=, the original float model, its checkpoint directory, "
                "or a function from module path to weight"
            )

    def _format(self, fqn: str, placement: Placement) -> WeightFormat:
        found = placement.weight_format()
        if found is None:
            raise FoldError(_unreadable(fqn, placement))
        return found

    def check(self, result: Program) -> None:
        """No trainable rotation is left."""
        if left := [n for n, m in result.model.named_modules() if isinstance(m, Rotation)]:
            raise PassError(f"{left[0]} was not folded")

    def _policy(self, sites: Mapping[str, Site], fqn: str) -> str | Budget:
        if isinstance(self.quantized, (str, Budget)):
            return self.quantized
        if fqn not in sites:  # what only a recording shows is a float parameter
            return "keep"
        policy = self.quantized(sites[fqn])
        check_policy(policy, f"quantized(Site {fqn})")
        return policy


@dataclass(frozen=True, eq=False)
class _Todo:
    fqn: str
    placement: Placement
    format: WeightFormat
    policy: str | Budget


def _shared(model: nn.Module) -> set[int]:
    """Weights that several modules have."""
    counts = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    aliases = {id(p) for m in _several_names(model) for p in m._parameters.values() if p is not None}
    return {i for i, n in counts.items() if n > 1 and i not in aliases}


def _several_names(model: nn.Module) -> list[nn.Module]:
    counts = Counter(m for _, m in model.named_modules(remove_duplicate=False))
    return [m for m, n in counts.items() if n > 1]


def _later_hooks(placement: Placement) -> str:
    """A remark where a pre-hook that was registered later sees the rotated input now and the plain one after a fold."""
    if not isinstance(placement, RotateInput):
        return ""
    hooks = list(placement.module._forward_pre_hooks.values())
    later = hooks[hooks.index(placement) + 1 :]
    later = [h for h in later if not isinstance(h, Placement)]
    remark = f"{len(later)} pre-hook(s) registered after the rotation see the layer's unrotated input now"
    return remark if later else ""


def _unreadable(fqn: str, placement: Placement) -> str:
    kind = type(placement.module).__name__
    if hasattr(placement.module._parameters.get(placement.parameter), "full_tensor"):
        return (
            f"{fqn}: the weight of this {kind} is sharded by FSDP. Gather it first: load "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) into a model of one process "
            "that was transformed by the same rules, and fold that"
        )
    return f"{fqn}: no known weight format reads this {kind} any more"
