"""Fold adapters into the weights, with a measured report; and undo it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch.nn as nn

from oftfx.adapter.before_fold import Before, own_copy
from oftfx.adapter.distilled import distil_scales
from oftfx.adapter.fingerprint import fingerprint
from oftfx.adapter.fixed_rotations import guard_saving
from oftfx.adapter.folded import save_folded
from oftfx.adapter.store import AdapterStore, drop_store, located
from oftfx.errors import AdapterError, FoldError, warn
from oftfx.folding.aware import forget_all
from oftfx.folding.inputs import batches_of
from oftfx.folding.journal import Journal
from oftfx.folding.measure import Seen, measure, on_cpu, see
from oftfx.folding.note import note_fold
from oftfx.folding.peers import Peers
from oftfx.folding.policies import Policy
from oftfx.folding.provenance import command_line, provenance_of
from oftfx.folding.record import Folds, SiteFold
from oftfx.folding.reference import Reference, ReferenceWeights
from oftfx.folding.report import FoldReport
from oftfx.folding.same import APART, check_model
from oftfx.folding.still import held_still
from oftfx.folding.verdict import warn_of
from oftfx.formats.mxfp4_experts import born_in_mxfp4
from oftfx.formats.sharded import is_sharded, reshard
from oftfx.model.huggingface import note_float_layers
from oftfx.model.running import Inputs
from oftfx.passes.check_readers import CheckReaders
from oftfx.passes.fold_into_producers import FoldIntoProducers
from oftfx.passes.fold_rotations import FoldRotations
from oftfx.passes.protocol import PassManager
from oftfx.placement.aware import make_aware, unfolded
from oftfx.placement.find import check_unaware, rotated_sites
from oftfx.placement.rows import check_no_rows
from oftfx.placement.torch_private import forget_compiled
from oftfx.planning.program import Program
from oftfx.planning.site_plan import Producer
from oftfx.rotation.accelerate import is_offloaded
from oftfx.terminal import bar

_MEASURED = 8  # batches that both models run: calibrating needs many, an error is known by fewer


@dataclass(frozen=True)
class FoldResult:
    """A folded model and what the fold did. Keeping it keeps the old weights, for `unfold`; ``.model`` alone does not.

    Of a fold in place without ``undo`` nothing is kept.

    Attributes:
        model: a plain model, without trainable rotations.
        report: see `FoldReport`.

    Examples:
        >>> import oftfx, torch
        >>> base, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(5, 6)
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> result = oftfx.fold(model)
        >>> type(result.model).__name__, oftfx.active_adapters(result.model)
        ('Sequential', ())
        >>> sorted(file.name for file in result.save("folded").iterdir())
        ['model.safetensors', 'oftfx_fold.json']
    """

    model: nn.Module
    report: FoldReport
    _before: nn.Module | None = field(repr=False, default=None)
    _undo: Before | None = field(repr=False, default=None)

    def save(
        self,
        directory: str | Path,
        *,
        save_as: Literal["compressed-tensors", "gptq", "awq"] | None = None,
        server: Literal["vllm"] | None = None,
        rotations: Literal["code", "transforms"] | None = None,
    ) -> Path:
        """Write everything that `oftfx.load_folded` needs to bring ``.model`` back.

        That is the checkpoint with its configuration as ``save_pretrained`` writes it (of other modules the
        ``state_dict`` as ``model.safetensors``), the rotations that stay in front of quantized weights
        (``oftfx_rotations.safetensors``), and ``oftfx_fold.json``: the report, and what tells whether the files belong
        together. All land at once; an earlier save of ours is replaced whole, and files of others (a tokenizer, a
        README) stay.

        ``from_pretrained`` alone reads such a directory as well. Where there are rotations it **drops them**;
        ``"oftfx_rotations"`` in ``config.json`` says so.

        Args:
            directory: made where it is not there.
            save_as: quantized layers of any format of integers in groups of columns (GPTQ, AWQ, int8, ...) in another
                form, with the same weights to the bit, or an error: ``"compressed-tensors"``, that package's
                ``pack-quantized``; ``"gptq"``, of version 1 unless a zero point is 0; ``"awq"``, 4 bits. The last two
                have float16 scales and one size of groups for all layers.
            server: ``"vllm"``: write only what that server reads; the error names what it reads instead.
            rotations: how that server is given the rotations that stay in front of quantized weights
                (``quantized="keep"``), with ``save_as="compressed-tensors"``. ``"code"``, the default: a file of code
                beside the weights rotates, and the server starts with ``--trust-remote-code``; any rotation.
                ``"transforms"``: a ``transform_config``, which vLLM's own layers apply; the guide on vLLM says which.

        Returns:
            The directory.

        Raises:
            FoldError: it cannot be written, holds a checkpoint of others, or the model is one that its own loader would
                not bring back (the message says why). What was there is as it was then.
        """
        return save_folded(self.model, self.report, directory, save_as=save_as, server=server, rotations=rotations)


def fold(
    model: nn.Module,
    *,
    quantized: Policy | None = None,
    adapter: str | Sequence[str] | None = None,
    into: Literal["site", "producer"] = "site",
    calibration: Iterable[Mapping[str, Any] | tuple[Any, ...]] | None = None,
    reference: Reference | None = None,
    distil: int = 0,
    inplace: bool = False,
    undo: bool | None = None,
    distributed: bool = False,
    progress: bool | Callable[[int, int], None] = False,
) -> FoldResult:
    """Put rotations into the weights they stand in front of: ``W' = W @ blockdiag(R)^T``.

    Float weights are folded exactly: in float32 (float64 for float64 weights), blockwise, rounded once. Quantized ones
    by policy. A weight whose rotation is exactly the identity is not touched.

    Args:
        model: a transformed model.
        quantized: None: sites that were trained through their fold (`oftfx.fold_aware`) get the codes and scales they
            have computed with, bit for bit; others are kept. ``"keep"``: the quantized weight stays bit for bit and a
            fixed rotation stays in front of it (exact; `FoldResult.save` writes both, its own loader would drop it);
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
            The inputs go through the model, and the unfolded one, side by side: memory is that of the hidden states of
            all of them in both, besides some matrices ``(in, in)`` of one layer and what its fold takes. No keys and
            values are cached, unless an input has a ``use_cache`` or a cache of its own.
        reference: the original float model, the directory of its checkpoint, or a function from module path to weight.
            Only for adapters that were trained on the float model: one that was trained on a quantized model has learnt
            that model's errors as well, and they are not in these weights.
        distil: after ``"calibrate"`` (or ``"reference"`` with ``calibration``), so many passes over the calibration
            inputs in which the scales of the rounded weights learn to give the unfolded model's outputs, end to end. A
            pass takes what training on these inputs takes, in time and memory. One input in eight is held out, and the
            scales are kept only as far as they are better there.
        inplace: change ``model`` itself; otherwise the result shares every frozen weight that is not replaced. Weights
            that FSDP2 has sharded are only folded so: all processes call this, and each turns the rows it has.
        undo: keep what `unfold` needs. By default that of a fold in place is not kept, for it is the old weights: the
            memory of the whole model again. Interrupted, a fold in place then stays where it is: each site is folded or
            still rotates, so the model computes what the folded adapters did (up to the rounding asked for), and
            another fold ends it. With ``undo=True`` an interruption leaves the model as it was.
        distributed: ``calibration`` is this process's share of the inputs: all processes that ``torchrun`` has started
            (or that are in the process group that is initialised) call this, each with the same whole model, plain or
            in DDP. What layers read is added up over all of them, so each process ends with the same weights to the
            bit, and the same report. Their shares may differ in length, and be empty in some. Rounding is not shared
            out: every process does all of it. Where one fails, all do.
        progress: True for a progress bar (needs the ``report`` extra), or a function of (sites done, all sites).

    Returns:
        The folded model and its report.

    Raises:
        AdapterError: the model has no adapters, an unknown name, or none acts.
        FoldError: see `FoldRotations`; with ``distributed``, another process has failed, or has another model.

    Examples:
        >>> import oftfx, torch
        >>> base, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(5, 6)
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> result = oftfx.fold(model)
        >>> [(site.fqn, site.action) for site in result.report]
        [('0', 'folded')]
        >>> torch.allclose(result.model(x), model(x), atol=1e-6), torch.allclose(model(x), base(x))
        (True, False)
    """
    with Peers.joined(distributed) as peers:
        return _fold(model, quantized, adapter, into, calibration, reference, distil, inplace, undo, progress, peers)


def _fold(
    model: nn.Module,
    quantized: Policy | None,
    adapter: str | Sequence[str] | None,
    into: Literal["site", "producer"],
    calibration: Iterable[Mapping[str, Any] | tuple[Any, ...]] | None,
    reference: Reference | None,
    distil: int,
    inplace: bool,
    undo: bool | None,
    progress: bool | Callable[[int, int], None],
    peers: Peers,
) -> FoldResult:
    root, store = located(model)
    check_no_rows(root, "a fold")
    names = store.active if adapter is None else (adapter,) if isinstance(adapter, str) else tuple(adapter)
    names = store.together(names)
    if not names:
        raise AdapterError(f"no adapter is active; name one of {', '.join(store.adapters)} in fold(adapter=...)")
    if into not in ("site", "producer"):
        raise FoldError(f"into: got {into!r}, expected 'site' or 'producer'")
    if into == "producer" and quantized is None:
        check_unaware(root, "a fold into producers")
    sharded = reshard(root) and any(is_sharded(p.module._parameters.get(p.parameter)) for _, p in rotated_sites(root))
    if sharded and (not inplace or into == "producer"):
        raise FoldError("weights that FSDP has sharded are folded where they are: inplace=True, into='site'")
    if empty := next((fqn for fqn, p in rotated_sites(root) if _without_numbers(p.module)), None):
        raise FoldError(f"{empty} is on the meta device and has no numbers; load the weights before the fold")
    hashes = {name: fingerprint(root, name) for name in names}
    batches = batches_of(calibration)
    if quantized in ("requantize", "calibrate", "reference") and not _any_quantized(root):
        warn(f"quantized={quantized!r} has nothing to do: no rotated layer is quantized, and float ones fold exactly")
    original = None if reference is None else ReferenceWeights(reference)
    keeps = not inplace if undo is None else undo
    if distil and (distil < 0 or not batches):
        raise FoldError(f"distil: got {distil!r} passes with {len(batches)} calibration inputs; it needs some of both")
    if distil and peers.world > 1:
        raise FoldError("distil is not done by several processes; fold with distributed=True and no distil, or in one")
    check_model(root, peers, "One model, loaded and transformed alike in each, with one adapter's values")
    journal = Journal(keep=inplace and keeps)
    # The state before is kept as a structure of its own; nothing the user does to the model afterwards reaches it.
    before = None if inplace else own_copy(root)
    target = root if inplace else own_copy(root)
    own = located(target)[1]
    before_fold = Before.of(target, own, journal)
    aware = {placement: dict(placement.through) for _, placement in rotated_sites(target) if placement.through}
    with held_still(target, *(() if before is None else (before,))):
        try:
            own.activate(target, names)
            if quantized is not None:  # then it is from the rotations
                forget_all(target)
            seen = list[tuple[Seen, Seen]]()
            if before is None:  # a copy to run afterwards would keep the old weights alive while the new ones are made
                seen += [on_cpu(_seen(target, names, b, quantized is not None)) for b in batches[:_MEASURED]]
                for _, placement in rotated_sites(target):
                    placement.forget()  # as would rotated weights, and blocks, that the runs have kept
                    for rotation in placement.rotations.values():
                        rotation.forget()
            program, folds, distilled = Program.of(target), list[Folds](), None
            plans = [store.adapters[name].plan for name in names]
            readers = CheckReaders(plans, batches[0] if batches else None)
            unchecked = PassManager([readers]).run(program).found[readers.name]
            unchecked = min(peers.exchange("readers", unchecked), key=bool)  # what one has seen holds for all
            if into == "producer":
                push = FoldIntoProducers(_producers(store, names), journal)
                folds.append(PassManager([push], verify=batches[0] if batches else None).run(program).found[push.name])
            shown = progress if callable(progress) else None
            with bar("fold") if progress is True and not peers.rank else nullcontext(shown) as report_progress:
                made: Mapping[str, Any] = {"calibration": batches, "reference": original, "progress": report_progress}
                policy = "keep" if quantized is None else quantized
                if distil:
                    distilled = distil_scales(target, names, FoldRotations(policy, **made), distil, progress)
                lines = {} if distilled is None else distilled.lines
                step = FoldRotations(policy, **made, journal=journal, distilled=lines, peers=peers)
                folds.append(PassManager([step]).run(program).found[step.name])
        except BaseException as error:  # also an interruption
            forget_all(target)
            journal.restore(target)  # without undo, the site under way: none stays half folded
            for placement, through in aware.items():
                for one in through.values() if set(placement.rotations) else ():
                    make_aware(placement, one)
            if journal.keep:
                before_fold.restore(target)
            elif not journal.done:
                own.activate(target, before_fold.active)
            else:
                own.forget_folded(target)
                forget_compiled()
                error.add_note(
                    f"oftfx.fold: {journal.done} sites were folded when this happened, the others still rotate. Fold "
                    "again to end it; undo=True would have brought all back"
                )
            raise
        for parameter in own.parameters(names):
            parameter.requires_grad_(False)
        drop_store(target)
        guard_saving(target)
        sites = [_with_reason(s, folds[0].left) for each in folds for s in each.sites]
        note_float_layers(target, [s.fqn for s in sites if s.action == "dequantized"])
        check_model(target, peers, APART)
        some = batches[:_MEASURED]
        known = seen if before is None else (_seen(before, names, b, quantized is not None) for b in some)
        measured = measure(known, target, some, peers)
        remarks = [f"whether other code reads the folded weights: {unchecked}"] if unchecked else []
        origin = provenance_of(root, sites, hashes, batches, command=command_line()).joined(peers)
        if origin.calibration_inputs and measured is None:
            remarks.append("the model's outputs: no float tensor is among them")
        dropped = tuple(n for n in store.adapters if n not in names)
        done = "" if distilled is None else str(distilled)
        report = FoldReport(tuple(sites), names, dropped, measured, tuple(remarks), done, origin)
        note_fold(target, report, hashes)
        warn_of(report.verdict)
        before_fold.close(target)
        if inplace:
            forget_compiled()
    kept = before if keeps and not inplace else None
    return FoldResult(target, report, kept, before_fold if journal.keep else None)


def unfold(result: FoldResult) -> nn.Module:
    """Bring the adapters back: every weight has its original bytes, every rotation its place.

    A fold in place is undone in place. Otherwise the result is a module tree of its own, and the folded model stays.

    Raises:
        FoldError: nothing is known of the state before; or a fold in place is not the last thing that was done.

    Examples:
        >>> import oftfx, torch
        >>> base, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(5, 6)
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> result = oftfx.fold(model)
        >>> again = oftfx.unfold(result)
        >>> torch.equal(again(x), model(x)), oftfx.active_adapters(again)
        (True, ('default',))
    """
    if not isinstance(result, FoldResult):
        raise FoldError(
            f"unfold: got a {type(result).__name__}, expected what oftfx.fold returned: only that knows the old weights"
        )
    if result._before is not None:
        return own_copy(result._before)
    if result._undo is None:
        raise FoldError("this fold kept nothing of the state before it; fold with undo=True to undo it")
    result._undo.check(result.model)
    result._undo.restore(result.model)
    return result.model


def _without_numbers(module: nn.Module) -> bool:
    return any(t is not None and t.is_meta for t in module._parameters.values()) and not is_offloaded(module)


def _any_quantized(root: nn.Module) -> bool:
    """Or to be rounded again into the codes that they were made from."""
    found = ((placement.weight_format(), placement.module) for _, placement in rotated_sites(root))
    return any(f is not None and (not f.lossless or born_in_mxfp4(f, m) is not None) for f, m in found)


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


def _seen(model: nn.Module, names: Sequence[str], batch: Inputs, turned: bool) -> tuple[Seen, Seen]:
    """What a model makes of a batch with these adapters, and without any; it is left as it was.

    Args:
        model: rotated.
        names: the adapters.
        batch: the input.
        turned: by its rotations, also where sites are fold-aware.
    """
    store = located(model)[1]
    active = store.active
    try:
        found = []
        for some in (tuple(names), ()):
            store.activate(model, some)
            with unfolded() if turned else nullcontext():
                found.append(see(model, batch))
    finally:
        store.activate(model, active)
    return found[0], found[1]
