"""Train through the fold: `fold_aware`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch.nn as nn

from oftfx.adapter.distilled import calibrated_codes, distil_scales, folded_codes
from oftfx.adapter.scales import saved_scales
from oftfx.adapter.store import AdapterStore
from oftfx.adapter.switch import switchable
from oftfx.errors import AdapterError, FoldError
from oftfx.folding.aware import forget_all, make_all_aware, nearest, quantized_sites, scales
from oftfx.folding.inputs import batches_of
from oftfx.folding.reference import Reference, ReferenceWeights
from oftfx.folds import FoldResult
from oftfx.passes.fold_rotations import FoldRotations
from oftfx.placement.aware import Aware, forget_aware, make_aware
from oftfx.placement.base import Placement
from oftfx.placement.find import rotated_sites
from oftfx.placement.rows import check_no_rows
from oftfx.placement.torch_private import forget_compiled

Way = Literal["requantize", "reference", "calibrate"]
WAYS = ("requantize", "reference", "calibrate")


class FoldAwareness:
    """What `fold_aware` returns: the end of its ``with`` brings back what was there before the call.

    Attributes:
        sites: how many compute with what their fold will write.
        remark: what was done to get there.
    """

    def __init__(self, root: nn.Module, store: AdapterStore) -> None:
        self._root, self._store = root, store
        self._before = {p: dict(p.through) for _, p in rotated_sites(root)}
        self.sites, self.remark = 0, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """Bring it back now."""
        for placement, before in self._before.items():
            if placement.rotations:
                _restore(placement, before)
        self._store.follow(self._root)
        forget_compiled()


def fold_aware(
    model: nn.Module,
    how: Way | None,
    *,
    adapter: str | Sequence[str] | None = None,
    calibration: Iterable[Any] | str | Path | FoldResult | None = None,
    reference: Reference | None = None,
    distil: int = 0,
    progress: bool | Callable[[int, int], None] = False,
) -> FoldAwareness:
    """Let quantized sites compute with the weight that their fold will write, in place, until it is taken back.

    `oftfx.fold` then writes the very codes and scales of the last forward. Float sites fold exactly and stay as they
    are. While another choice of adapters acts, and inside `adapter_rows`, sites rotate as always.

    * ``"requantize"``: ``W_folded = Q(W @ blockdiag(R)^T)``, nearest codes by the format's own grid, anew in every
      forward; gradients go straight through the rounding to the rotation. The weight lies on its grid before it is
      turned, so a small rotation flips few codes: train at a larger rate from the start, and expect the adapter to be
      good folded only.
    * ``"reference"``: the same from the original float weights, for adapters that began on the float model.
    * ``"calibrate"``: the codes of ``fold(quantized="calibrate")`` for the adapter as it is, under scales that train.
      The rotations stand still, so the adapter stays what it was unfolded. For the end of a run: train as always, then
      call this, then train some steps more on the same loss (a new optimiser over `oftfx.adapter_parameters`; the same
      learning rate does), then fold.

    Args:
        model: a transformed model.
        how: None: rotations act again.
        adapter: which adapters, in the order they act; None for the active ones.
        calibration: for ``"calibrate"``, as of `oftfx.fold`; or what a calibrated fold of this adapter has given, to
            start from its codes; or the directory in which `oftfx.save_adapter` has written this adapter with its
            scales, to go on from there.
        reference: for ``"reference"``, as of `oftfx.fold`.
        distil: for ``"calibrate"``, so many passes over ``calibration`` in which the scales learn the unfolded outputs,
            as of `oftfx.fold`; then no training of one's own is needed.
        progress: as of `oftfx.fold`.

    Returns:
        To be used as a context, or to be ignored.

    Raises:
        AdapterError: an unknown adapter, or none acts.
        FoldError: an unknown way or one without what it needs; a site whose format has no codes for single weights,
            whose layer does not multiply its last axis, or whose rotation has dropout; ``"calibrate"`` for an adapter
            that is exactly the identity.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.formats import format_named
        >>> base = torch.nn.Sequential(format_named("bnb8").make_tiny(66, 10))
        >>> model, x = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")}), torch.randn(5, 66)
        >>> unfolded = model(x)
        >>> with oftfx.fold_aware(model, "requantize"):
        ...     folded = oftfx.fold(model)
        ...     print(torch.allclose(model(x), folded.model(x), atol=1e-5), torch.equal(model(x), unfolded))
        True False
        >>> torch.equal(model(x), unfolded)
        True
    """
    root, store = switchable(model)
    check_no_rows(root, "fold_aware")
    if how is not None and how not in WAYS:
        raise FoldError(f"fold_aware: got {how!r}, expected None or one of {', '.join(WAYS)}")
    names = store.active if adapter is None else (adapter,) if isinstance(adapter, str) else tuple(adapter)
    names = store.together(names)
    if not names:
        raise AdapterError(f"no adapter is active; name one of {', '.join(store.adapters)} in fold_aware(adapter=...)")
    result = FoldAwareness(root, store)
    if how is None:
        forget_all(root, names)
    else:
        try:
            _enter(result, root, store, how, names, calibration, reference, distil, progress)
        except BaseException:  # also an interruption: no half-trained scales stay
            result.restore()
            raise
    store.follow(root)
    forget_compiled()
    return result


def _enter(
    result: FoldAwareness,
    root: nn.Module,
    store: AdapterStore,
    how: Way,
    names: tuple[str, ...],
    calibration: Iterable[Any] | str | Path | FoldResult | None,
    reference: Reference | None,
    passes: int,
    progress: bool | Callable[[int, int], None],
) -> None:
    known = isinstance(calibration, (str, Path, FoldResult))
    batches = [] if isinstance(calibration, (str, Path, FoldResult)) else batches_of(calibration)
    if how == "calibrate" and not batches and not known:
        raise FoldError("fold_aware: 'calibrate' needs calibration=, an iterable of model inputs")
    if (how == "reference") != (reference is not None):
        raise FoldError(f"fold_aware: {how!r} and reference={reference!r} do not go together")
    if passes and (how != "calibrate" or known):
        raise FoldError("fold_aware: distil trains the scales of 'calibrate', on calibration inputs")
    sites = quantized_sites(root, names)
    if not sites:
        raise FoldError("fold_aware: none of these adapters acts on a quantized weight; float ones fold exactly")
    if how != "calibrate":
        result.sites = make_all_aware(sites, nearest(None if reference is None else ReferenceWeights(reference)))
        return
    if isinstance(calibration, (str, Path)):
        if len(names) > 1:
            raise FoldError("fold_aware: save_adapter writes the scales of one adapter, and several are named")
        result.sites = make_all_aware(sites, saved_scales(Path(calibration), root, names[0]))
        return
    fold = FoldRotations("calibrate", calibration=batches, progress=None if progress is True else progress or None)
    if isinstance(calibration, FoldResult):
        codes = folded_codes(root, names, calibration._before, calibration.model, calibration.report)
        result.sites = make_all_aware(sites, scales(codes))
    elif passes:
        active = store.active
        store.activate(root, names)
        try:
            done = distil_scales(root, names, fold, passes, progress)
        finally:
            store.activate(root, active)
        result.sites, result.remark = len(done.lines), str(done)
    else:
        result.sites = make_all_aware(sites, scales(calibrated_codes(root, names, fold)[0]))
    if not result.sites:
        raise FoldError(
            "fold_aware: every rotation of a quantized weight is exactly the identity, so a calibrated fold rounds "
            "nothing and there are no scales to train. Train the adapter first"
        )


def _restore(placement: Placement, before: dict[tuple[str, ...], Aware]) -> None:
    if placement.through == before:
        return
    forget_aware(placement)
    for aware in before.values():
        make_aware(placement, aware)
