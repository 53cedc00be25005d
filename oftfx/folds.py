"""Fold adapters into the weights, with a measured report; and undo it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn as nn

from oftfx.adapter.fingerprint import fingerprint
from oftfx.adapter.store import AdapterStore, drop_store, keep_store, located
from oftfx.errors import AdapterError, FoldError
from oftfx.folding.measure import Measured, measure
from oftfx.folding.note import forget_fold, note_fold
from oftfx.folding.policies import Policy
from oftfx.folding.record import SiteFold
from oftfx.folding.reference import Reference, ReferenceWeights
from oftfx.folding.report import FoldReport
from oftfx.model.huggingface import QuantizerNotes, note_float_layers
from oftfx.model.structure import structural_copy
from oftfx.passes.fold_into_producers import FoldIntoProducers
from oftfx.passes.fold_rotations import FoldRotations
from oftfx.passes.protocol import PassManager
from oftfx.planning.program import Program
from oftfx.planning.site_plan import Producer
from oftfx.terminal import bar

_MEASURED = 8  # batches that both models run: calibrating needs many, an error is known by fewer


@dataclass(frozen=True)
class FoldResult:
    """A folded model and what the fold did. Keeping it keeps the old weights, for `unfold`; ``.model`` alone does not.

    Attributes:
        model: a plain model, without trainable rotations.
        report: see `FoldReport`.
    """

    model: nn.Module
    report: FoldReport
    _before: nn.Module | None = field(repr=False, default=None)
    _undo: Before | None = field(repr=False, default=None)


def fold(
    model: nn.Module,
    *,
    quantized: Policy = "keep",
    adapter: str | Sequence[str] | None = None,
    into: Literal["site", "producer"] = "site",
    calibration: Iterable[Mapping[str, Any] | tuple[Any, ...]] | None = None,
    reference: Reference | None = None,
    inplace: bool = False,
    progress: bool | Callable[[int, int], None] = False,
) -> FoldResult:
    """Put rotations into the weights they stand in front of: ``W' = W @ blockdiag(R)^T``.

    Float weights are folded exactly: in float32 (float64 for float64 weights), blockwise, rounded once. Quantized ones
    by policy. A weight whose rotation is exactly the identity is not touched.

    Args:
        model: a transformed model.
        quantized: ``"keep"``: the quantized weight stays bit for bit and a fixed rotation stays in front of it (exact);
            ``"float"``: the layer becomes a float one (exact, larger); ``"requantize"``: rounded to the format's
            nearest codes, which loses part of a small update, see `FoldReport.survival`; ``"calibrate"``: rounded so
            that the layer's outputs on ``calibration`` change least, error-compensated, layer after layer in the order
            in which the model runs them; ``"reference"``: the rotated original float weights are rounded, with error
            compensation where there is ``calibration``. A `Budget` takes for each site the first policy that is good
            enough; a function from `Site` gives any of these.
        adapter: which adapters, in the order they act; None for the active ones. Others are dropped, and reported.
        into: ``"producer"``: where a site's rotation can be pushed exactly into the layer that makes its input (v_proj
            for o_proj, say), its own weight stays bit for bit and that layer's rows are turned; the report says for
            every other site why it is folded on itself instead. See `FindProducers`.
        calibration: inputs of the model (dicts of keyword arguments or tuples), some dozens of real ones: for the
            policies that need them, and (the first eight) to measure the whole model's output error and perplexity on.
        reference: the original float model, the directory of its checkpoint, or a function from module path to weight.
            Only for adapters that were trained on the float model: one that was trained on a quantized model has learnt
            that model's errors as well, and they are not in these weights.
        inplace: change ``model`` itself; otherwise the result shares every tensor that the fold does not replace.
        progress: True for a progress bar (needs the ``report`` extra), or a function of (sites done, all sites).

    Returns:
        The folded model and its report.

    Raises:
        AdapterError: the model has no adapters, an unknown name, or none acts.
        FoldError: see `FoldRotations`.
    """
    root, store = located(model)
    names = store.active if adapter is None else (adapter,) if isinstance(adapter, str) else tuple(adapter)
    store.require(*names)
    if not names:
        raise AdapterError(f"no adapter is active; name one of {', '.join(store.adapters)} in fold(adapter=...)")
    if len(set(names)) != len(names):
        raise AdapterError(f"an adapter is named twice in {list(names)}")
    if into not in ("site", "producer"):
        raise FoldError(f"into: got {into!r}, expected 'site' or 'producer'")
    hashes = {name: fingerprint(root, name) for name in names}
    batches = _batches(calibration)
    original = None if reference is None else ReferenceWeights(reference)
    step = FoldRotations(quantized, calibration=batches, reference=original)
    # The state before is kept as a structure of its own; nothing the user does to the model afterwards reaches it.
    before = structural_copy(root) if not inplace or batches else None
    target = root if inplace else structural_copy(root)
    own = located(target)[1]
    pushing = FoldIntoProducers(_producers(store, names)) if into == "producer" else None
    undo = Before.of(target, own, [*([pushing] if pushing else []), step])
    try:
        own.activate(target, names)
        program = Program.of(target)
        if pushing is not None:
            PassManager([pushing], verify=batches[0] if batches else None).run(program)
        with bar("fold") if progress is True else nullcontext(progress or None) as step.progress:
            PassManager([step]).run(program)
    except BaseException:  # also an interruption: in place, half a fold must not stay
        if inplace:
            undo.restore(target)
        raise
    for parameter in own.parameters(names):
        parameter.requires_grad_(False)
    drop_store(target)
    note_float_layers(target, [s.fqn for s in step.sites if s.action == "dequantized"])
    measured = None if before is None or not batches else _measured(before, target, names, batches)
    sites = [*pushing.sites, *(_with_reason(s, pushing.reasons) for s in step.sites)] if pushing else step.sites
    report = FoldReport(tuple(sites), names, tuple(n for n in store.adapters if n not in names), measured)
    note_fold(target, report, hashes)
    return FoldResult(target, report, None if inplace else before, undo if inplace else None)


def unfold(result: FoldResult) -> nn.Module:
    """Bring the adapters back: every weight has its original bytes, every rotation its place.

    A fold in place is undone in place. Otherwise the result is a module tree of its own, and the folded model stays.

    Raises:
        FoldError: nothing is known of the state before.
    """
    if result._before is not None:
        return structural_copy(result._before)
    if result._undo is None:
        raise FoldError("this FoldResult does not know the state before the fold")
    result._undo.restore(result.model)
    return result.model


@dataclass(frozen=True)
class Before:
    """What a fold in place has to bring back besides the sites themselves."""

    store: AdapterStore
    active: tuple[str, ...]
    trainable: tuple[nn.Parameter, ...]
    quantizer: QuantizerNotes
    steps: Sequence[FoldIntoProducers | FoldRotations]

    @classmethod
    def of(cls, model: nn.Module, store: AdapterStore, steps: Sequence[FoldIntoProducers | FoldRotations]) -> Before:
        """The state now; ``steps`` will know what happened to each site."""
        trainable = tuple(p for p in store.parameters(tuple(store.adapters)) if p.requires_grad)
        return cls(store, store.active, trainable, QuantizerNotes(model), steps)

    def restore(self, model: nn.Module) -> None:
        """Bring it back into the same model."""
        for done in reversed([u for step in self.steps for u in step.undo]):
            done.restore(model)
        keep_store(model, self.store)
        self.store.activate(model, self.active)
        for parameter in self.trainable:
            parameter.requires_grad_(True)
        self.quantizer.restore(model)
        forget_fold(model)


def _producers(store: AdapterStore, names: Sequence[str]) -> dict[str, Producer | str]:
    """For each site its producer, or why it has none; adapters that act together have to agree."""
    found: dict[str, Producer | str] = {}
    for name in names:
        for entry in store.adapters[name].plan:
            mine: Producer | str = entry.producer or entry.producer_reason
            if found.setdefault(entry.fqn, mine) != mine:
                found[entry.fqn] = "the adapters' plans differ in its producer"
    return found


def _with_reason(site: SiteFold, reasons: Mapping[str, str]) -> SiteFold:
    reason = reasons.get(site.fqn)
    note = "; ".join(n for n in (site.note, f"not into a producer: {reason}") if n)
    return replace(site, note=note) if reason and site.action != "untouched" else site


def _batches(calibration: Any) -> list[Mapping[str, Any] | tuple[Any, ...]]:
    if calibration is None:
        return []
    if isinstance(calibration, (Mapping, torch.Tensor, str)):
        raise FoldError(
            f"calibration: got a {type(calibration).__name__}, expected an iterable of inputs, e.g. [inputs]; each a "
            "dict of keyword arguments or a tuple"
        )
    batches = list(calibration)
    if wrong := [b for b in batches if not isinstance(b, (Mapping, tuple))]:
        raise FoldError(f"calibration: a {type(wrong[0]).__name__} among the inputs; each is a dict or a tuple")
    return batches


def _measured(
    before: nn.Module, after: nn.Module, names: Sequence[str], batches: Sequence[Mapping[str, Any] | tuple[Any, ...]]
) -> Measured:
    """The folded model against the unfolded one with the same adapters; ``before`` is left as it was."""
    store = located(before)[1]
    active = store.active
    store.activate(before, tuple(names))
    try:
        return measure(before, after, batches[:_MEASURED])
    finally:
        store.activate(before, active)
