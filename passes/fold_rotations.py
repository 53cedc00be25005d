"""Put rotations into the weights: ``W' = W @ blockdiag(R)^T``, and measure what arrived."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn

from oftfx.errors import FoldError, OftfxError, PassError, warn
from oftfx.folding.float_weight import fold_float, no_rows
from oftfx.folding.hooks import hooks_remark
from oftfx.folding.journal import Journal
from oftfx.folding.peers import Peers
from oftfx.folding.policies import Budget, Policy, check_policy, choices
from oftfx.folding.record import Folds, SiteFold
from oftfx.folding.reference import ReferenceWeights
from oftfx.folding.same import APART, digest
from oftfx.folding.shards import of_all_rows, together
from oftfx.folding.shown import Shown
from oftfx.folding.turned import Turned, untouched
from oftfx.folding.workbench import Workbench
from oftfx.formats.base import WeightFormat
from oftfx.formats.experts import ExpertsFormat
from oftfx.formats.mxfp4_experts import born_in_mxfp4
from oftfx.formats.sharded import ShardedRows, groups_of, is_sharded, reshard
from oftfx.model.running import Inputs
from oftfx.model.site import Site
from oftfx.model.structure import structural_copy
from oftfx.passes.protocol import Change, Pass, PassResult
from oftfx.passes.quantized.as_trained import AsTrained
from oftfx.passes.quantized.calibrate import NOT_REACHED, Calibrate, give_folded, in_running_order
from oftfx.passes.quantized.calibrate_experts import UNSEEN
from oftfx.passes.quantized.dequantize import Dequantize
from oftfx.passes.quantized.from_reference import FromReference
from oftfx.passes.quantized.keep import Keep
from oftfx.passes.quantized.policy import QuantizedPolicy
from oftfx.passes.quantized.requantize import Requantize
from oftfx.placement.base import Placement
from oftfx.placement.find import rotated_sites
from oftfx.placement.frozen import product_of
from oftfx.planning.program import Program
from oftfx.rotation.accelerate import is_offloaded
from oftfx.rotation.ieee import ieee_products
from oftfx.rotation.module import Rotation

_POLICIES: Mapping[str, type[QuantizedPolicy]] = {
    "keep": Keep,
    "float": Dequantize,
    "requantize": Requantize,
    "calibrate": Calibrate,
}
_ROUNDING = ("requantize", "calibrate", "reference")
_NEVER_RAN = (
    "this layer has never been called while others have, so its rotation may not be part of what the model computed "
    "(its weight may be used by other code); compare folded and unfolded outputs, or exclude it by a rule"
)
_NO_REFERENCE = (
    "policy 'reference' needs reference=, the original float model, its checkpoint directory, or a function from "
    "module path to weight"
)


class FoldRotations(Pass):
    """Fold every site of the model in place: ``W' = W @ blockdiag(R)^T``.

    A float weight takes its rotation exactly, computed in float32 (float64 for float64) blockwise and rounded once.
    A quantized one follows the policy; see `oftfx.fold`. A weight whose rotation is exactly the identity is never
    touched.

    Sites that are calibrated come last, in the order in which the model runs them: each sees what the layers before it
    have become. See `oftfx.folding.lockstep`. What was done is in the result's ``found``, a `Folds`.

    Args:
        quantized: a policy, or a function from `Site` to one.
        calibration: inputs of the model, for error-compensated rounding.
        reference: original float weights, for that policy.
        progress: called with (sites done, all sites) after each.
        journal: notes what was there before each change.
        distilled: sites whose fold-aware weights were made by distilling a calibrated fold, with its lines. What other
            fold-aware sites compute with is written as it is, whatever the policy; see `AsTrained`.
        peers: processes that fold the same model, each with calibration inputs of its own; all of them make this pass
            and run it.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.passes import FoldRotations, Program
        >>> base, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(5, 6)
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> rotated = model(x)
        >>> [(site.fqn, site.action) for site in FoldRotations().run(Program.of(model)).found.sites]
        [('0', 'folded')]
        >>> torch.allclose(model(x), rotated, atol=1e-6), torch.allclose(model(x), base(x))
        (True, False)
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
        journal: Journal | None = None,
        distilled: Mapping[str, SiteFold] | None = None,
        peers: Peers | None = None,
    ) -> None:
        if not callable(quantized) or isinstance(quantized, Budget):
            check_policy(quantized, "quantized")
        self.quantized, self.calibration, self.reference = quantized, tuple(calibration), reference
        self.progress, self.journal = progress, journal or Journal(keep=False)
        self.distilled, self.peers = distilled or {}, peers or Peers()
        self._has_inputs = any(self.peers.exchange("calibration inputs", bool(self.calibration)))

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        """Fold, site by site.

        Raises:
            FoldError: an unknown policy, or one without what it needs; a weight that is not finite; a layer that does
                not compute ``x @ W^T``.
        """
        reshard(program.model)  # what a forward has left whole would be written to in vain
        todo = self._todo(program)
        policies = {t.fqn: f"{t.format.name} {t.policy!r}" for t in todo}
        self.peers.check_same("sites", policies, "All processes fold the same sites by the same policies")
        todo = [t.with_chain() if isinstance(t.format, ShardedRows) else t for t in todo]
        cut = {t.fqn: groups_of(t.placement.module) for t in todo if isinstance(t.format, ShardedRows)}
        with ieee_products(), together([g for groups in cut.values() for g in groups]):
            lines = self._folded(program, todo)
        lines = tuple(of_all_rows(s, cut.get(s.fqn, ())) for s in lines)
        changes = tuple(Change(s.fqn, s.action, s.note) for s in lines)
        return PassResult(program.renewed(), bool(lines), changes, Folds(lines))

    def _folded(self, program: Program, todo: list[_Todo]) -> tuple[SiteFold, ...]:
        model = program.model
        bench = Workbench(program.index, self.journal)
        program.index.clear()  # else it would keep what the fold replaces
        some_ran = any(t.placement.ran for t in todo)
        remarks = {t.fqn: _NEVER_RAN if some_ran and not t.placement.ran else hooks_remark(t.placement) for t in todo}
        remarks |= {t.fqn: UNSEEN for t in todo if self._is_unseen(t)}
        later = dict[nn.Module, list[_Todo]]()
        for one in todo:
            if self._is_calibrated(one):
                later.setdefault(one.placement.module, []).append(one)
        calibrated = {t.fqn for some in later.values() for t in some}
        if self.peers.world > 1 and (fused := [t.fqn for t in todo if t.fqn in calibrated and t.placement.format]):
            raise FoldError(
                f"{fused[0]}: experts that are parameters of one layer are calibrated in one process only: the rows of "
                "each are not put together. Do that, or let quantized= be a function with 'requantize' for them"
            )
        at_once = [t for t in todo if t.fqn not in calibrated]
        order, done = [t.fqn for t in todo], dict[str, SiteFold]()

        def fold(one: _Todo, shown: Shown | None = None, remark: str = "") -> None:
            bench.note(one.placement, one.format)
            result = self._fold(one, bench, shown)
            if one.fqn not in calibrated:  # else a forward of it is under way
                bench.finish()
            if one.fqn in calibrated and self.peers.world > 1:
                now = {one.fqn: digest(one.format.dequantize(one.placement.module))}
                self.peers.check_same("what was rounded", now, APART)
            self.journal.site_done()
            was_rounded = result.action in ("requantized", "from reference")
            remark = "; ".join(r for r in (remark if was_rounded else "", remarks[one.fqn]) if r)
            if remark:
                result = replace(result, note="; ".join(n for n in (result.note, remark) if n))
                warn(f"{one.fqn}: {remark}")
            done[one.fqn] = result
            if self.progress is not None:
                self.progress(len(done), len(order))

        unfolded = self._unfolded(program, later)
        todo.clear()  # a layer in whose place another one stands is not kept
        while at_once:
            fold(at_once.pop(0))

        def fold_layer(module: nn.Module, shown: Shown | None) -> None:
            for one in later[module]:  # of experts, one parameter after the other
                fold(one, shown, "" if shown is not None else NOT_REACHED)

        def leave(module: nn.Module, fellow: nn.Module | None) -> None:
            give_folded([t.format for t in later[module]], module, fellow)

        experts = {m for m, some in later.items() if some[0].placement.format is not None}
        in_running_order(
            model, list(later), self.calibration, fold_layer, unfolded, leave, experts=experts, peers=self.peers
        )
        bench.finish()
        return tuple(done[fqn] for fqn in order)

    def _todo(self, program: Program) -> list[_Todo]:
        sites = {s.fqn: s for s in program.sites}
        todo = [_todo(fqn, p, self._policy(sites, fqn)) for fqn, p in rotated_sites(program.model)]
        for one in todo:  # before anything changes
            self._check(one)
        return todo

    def _unfolded(
        self, program: Program, later: Mapping[nn.Module, list[_Todo]]
    ) -> tuple[nn.Module, Sequence[nn.Module]] | None:
        """The model as it is now, to run beside the one that is folded, with the layers that are calibrated."""
        if not any("calibrate" in choices(one.policy) for some in later.values() for one in some):
            return None
        memo = dict[int, Any]()
        try:
            return structural_copy(program.model, memo), [memo[id(module)] for module in later]
        except (OftfxError, KeyError) as error:  # a lock in it, a __deepcopy__ of its own
            warn(
                f"calibrate: {type(program.model).__name__} cannot run unfolded beside its fold ({error}), so no layer "
                "makes up for what earlier ones lose"
            )
            return None

    def _fold(self, one: _Todo, bench: Workbench, shown: Shown | None) -> SiteFold:
        if isinstance(one.format, ShardedRows) and one.format.is_empty(one.placement.module):
            return no_rows(one.fqn, one.placement, one.format, one.chain or [])
        if one.format.lossless:
            return fold_float(one.fqn, one.placement, one.format, bench, one.chain)
        # What scales have learnt is not lost where the rotation is the identity.
        site = Turned.of(one.fqn, one.placement, one.format, bench.remark(one.placement), always=one.as_trained)
        if site is None:
            return untouched(one.fqn, one.placement, one.format)
        if one.as_trained:
            return AsTrained(self.distilled).line(site, bench)
        options = choices(one.policy)
        for option in options[:-1]:
            if option == "calibrate" and shown is None:
                continue
            bound = one.policy if isinstance(one.policy, Budget) else None
            if (done := self._of(option).fold(site, bench, _for(option, shown), bound)) is not None:
                return done
        last = self._of(options[-1]).fold(site, bench, _for(options[-1], shown), None)
        if last is None:
            raise FoldError(f"{one.fqn}: policy {options[-1]!r} was to be taken as it is and has folded nothing")
        return last

    def _of(self, policy: str) -> QuantizedPolicy:
        if policy == "reference":
            if self.reference is None:
                raise FoldError(_NO_REFERENCE)
            return FromReference(self.reference)
        return _POLICIES[policy]()

    def _is_calibrated(self, one: _Todo) -> bool:
        if one.format.lossless or one.as_trained or not self._has_inputs:
            return False
        if one.placement.format is not None:  # moments are only known of experts that are rounded one by one
            return isinstance(one.format, ExpertsFormat) and "calibrate" in choices(one.policy)
        # A budget measures output errors where it can.
        return isinstance(one.policy, Budget) or one.policy in ("calibrate", "reference")

    def _is_unseen(self, one: _Todo) -> bool:
        if self._is_calibrated(one) or not self._has_inputs:
            return False
        wanted = isinstance(one.policy, str) and one.policy in ("calibrate", "reference")
        return wanted and not one.format.lossless and one.placement.format is not None

    def _check(self, one: _Todo) -> None:
        if one.format.lossless or one.as_trained:
            return
        if choices(one.policy)[-1] == "calibrate" and not self._has_inputs:  # a budget passes it over, but for its last
            raise FoldError(
                f"{one.fqn}: policy 'calibrate' needs calibration=, an iterable of model inputs (some dozens of "
                "sequences of real text, say)"
            )
        if "reference" in choices(one.policy) and self.reference is None:
            raise FoldError(f"{one.fqn}: {_NO_REFERENCE}")

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
    chain: list[torch.Tensor] | None = None

    def with_chain(self) -> _Todo:
        """With its blocks, in whose making all processes take part: none may fail between two of them."""
        return replace(self, chain=product_of(self.placement.in_effect()))

    @property
    def as_trained(self) -> bool:
        """Whether it computes with a folded weight already."""
        return self.placement.fold_in_effect() is not None


def _todo(fqn: str, placement: Placement, policy: str | Budget) -> _Todo:
    found = placement.weight_format()
    if found is None and placement.format is None and (rows := ShardedRows()).matches(placement.module):
        found = rows
    if found is None:
        raise FoldError(_unreadable(fqn, placement))
    if is_offloaded(placement.module):
        raise FoldError(
            f"{fqn}: accelerate has offloaded this weight, and would read the old one again. Load the model without "
            "offloading (device_map='cpu'), put the adapter in with oftfx.load_adapter, and fold that"
        )
    if found.lossless and any(p in _ROUNDING for p in choices(policy)):
        found = born_in_mxfp4(found, placement.module) or found
    return _Todo(fqn, placement, found, policy)


def _for(policy: str, shown: Shown | None) -> Shown | None:
    """What a policy can use of it: what all experts read together says nothing of one."""
    return None if shown is not None and shown.experts is not None and policy != "calibrate" else shown


def _unreadable(fqn: str, placement: Placement) -> str:
    kind = type(placement.module).__name__
    if is_sharded(placement.module._parameters.get(placement.parameter)):
        return (
            f"{fqn}: the weight of this {kind} is sharded along what its rotation turns. Gather it first: load "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) into a model of one process "
            "that was transformed by the same rules, and fold that"
        )
    return f"{fqn}: no known weight format reads this {kind} any more"
