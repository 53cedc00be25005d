"""Fold adapters into the weights, with a measured report; and undo it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch.utils import _pytree as pytree

from oftfx.adapter.store import AdapterStore, drop_store, located
from oftfx.errors import AdapterError, FoldError
from oftfx.passes.fold_rotations import FoldRotations, Policy, Undo, restore
from oftfx.passes.protocol import PassManager, relative_error
from oftfx.program import Program
from oftfx.report.fold_report import FoldReport
from oftfx.structure import structural_copy


@dataclass(frozen=True)
class FoldResult:
    """A folded model and what the fold did. Keeping it keeps the old weights, for `unfold`; ``.model`` alone does not.

    Attributes:
        model: a plain model, without trainable rotations.
        report: see `FoldReport`.
    """

    model: nn.Module
    report: FoldReport
    _undo: tuple[Undo, ...] = field(repr=False, default=())
    _store: AdapterStore | None = field(repr=False, default=None)
    _inplace: bool = field(repr=False, default=False)


def fold(
    model: nn.Module,
    *,
    quantized: Policy = "keep",
    adapter: str | Sequence[str] | None = None,
    calibration: Iterable[Mapping[str, Any] | tuple[Any, ...]] | None = None,
    inplace: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> FoldResult:
    """Put rotations into the weights they stand in front of: ``W' = W @ blockdiag(R)^T``.

    Float weights are folded exactly: in float32 (float64 for float64 weights), blockwise, rounded once. Quantized ones
    by policy. A weight whose rotation is exactly the identity is not touched.

    Args:
        model: a transformed model.
        quantized: ``"keep"``: the quantized weight stays bit for bit and a fixed rotation stays in front of it (exact);
            ``"float"``: the layer becomes a float one (exact, larger); ``"requantize"``: rounded to the format's
            nearest codes, which loses part of a small update, see `FoldReport.survival`. Or a function from `Site` to
            one of these.
        adapter: which adapters, in the order they act; None for the active ones. Others are dropped, and reported.
        calibration: inputs to measure the whole model's output error on (dicts of keyword arguments or tuples).
        inplace: change ``model`` itself; otherwise the result shares every tensor that the fold does not replace.
        progress: called with (sites done, all sites).

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
    target = root if inplace else structural_copy(root)
    own = located(target)[1]
    active, own_active = store.active, own.active
    own.activate(target, names)
    batches = list(calibration) if calibration is not None else []
    before = [_outputs(target, b) for b in batches]
    step = FoldRotations(quantized, progress)
    try:
        PassManager([step]).run(Program.of(target))
    except Exception:
        # In place, a fault half way must not leave half a model.
        restore(target, step.undo)
        own.activate(target, own_active)
        raise
    kept = _keep_trained(target, own, names)
    drop_store(target)
    error = _output_error(before, [_outputs(target, b) for b in batches])
    report = FoldReport(tuple(step.sites), names, tuple(n for n in store.adapters if n not in names), error)
    own.active = active
    assert kept is not None
    return FoldResult(target, report, tuple(step.undo), own, inplace)


def unfold(result: FoldResult) -> nn.Module:
    """Bring the adapters back: every weight has its original bytes, every rotation its place.

    A fold in place is undone in place. Otherwise the result is a module tree of its own, and the folded model stays.

    Raises:
        FoldError: nothing is known of the state before.
    """
    if result._store is None:
        raise FoldError("this FoldResult does not know the state before the fold")
    model = result.model if result._inplace else structural_copy(result.model)
    restore(model, list(result._undo))
    store = result._store
    model.__dict__["_oftfx_adapters"] = store
    store.activate(model, store.active)
    return model


def _keep_trained(model: nn.Module, store: AdapterStore, names: tuple[str, ...]) -> tuple[str, ...]:
    """Parameters trained whole are in the model already, those of the active adapters; freeze them as they are."""
    for name in names:
        for parameter in store.trained[name].values():
            parameter.requires_grad_(False)
    return names


def _outputs(model: nn.Module, batch: Mapping[str, Any] | tuple[Any, ...]) -> list[torch.Tensor]:
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            out = model(**batch) if isinstance(batch, Mapping) else model(*batch)
    finally:
        for module, mode in training:
            module.training = mode
    leaves = pytree.tree_leaves(out)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _output_error(before: list[list[torch.Tensor]], after: list[list[torch.Tensor]]) -> float | None:
    if not before:
        return None
    old = torch.cat([t.double().flatten() for batch in before for t in batch])
    new = torch.cat([t.double().flatten() for batch in after for t in batch])
    return relative_error(new, old)
