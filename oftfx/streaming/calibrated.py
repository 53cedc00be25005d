"""Calibrate the layers of a checkpoint: the model runs, folded and unfolded, with few layers in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.from_file import AdapterFiles
from oftfx.adapter.load import with_readers
from oftfx.errors import FoldError, warn
from oftfx.folding.peers import Peers
from oftfx.folding.record import SiteFold
from oftfx.folding.same import APART, digest
from oftfx.folding.shown import Shown
from oftfx.folding.spill import Spill
from oftfx.formats.exact import choose_kernel, use_exact
from oftfx.formats.registry import format_of
from oftfx.model.running import Inputs
from oftfx.passes.insert_rotations import InsertRotations
from oftfx.passes.quantized.calibrate import NOT_REACHED, drop_rotations, in_running_order
from oftfx.placement.find import rotated_sites
from oftfx.planning.plans import Plan
from oftfx.planning.program import Program
from oftfx.planning.site_plan import SitePlan
from oftfx.rotation.ieee import ieee_products
from oftfx.streaming.decisions import Decisions
from oftfx.streaming.fold_layer import Folder
from oftfx.streaming.maps import Maps
from oftfx.streaming.memory import trim
from oftfx.streaming.resident import Resident, cannot_run, room_of
from oftfx.streaming.skeleton import Holder, put, shell
from oftfx.streaming.transformers_loader import make_buffers
from oftfx.streaming.work import Fold
from oftfx.trace.inputs import names_inputs

_ADAPTER = "default"
_STILL_TURNED = ("calibrate", "keep")
"""What becomes of sites whose rotation is in front of them when calibrating begins."""
Folded = tuple[tuple[SiteFold, ...], Mapping[str, Tensor]]


@dataclass
class Calibrating:
    """A run of the model in which each layer that is calibrated is folded when all inputs have reached it.

    The same code as for a model in memory shows the same inputs to the same rounding. Layers that an earlier run has
    done are not done again: the inputs go through what it has written.

    Args:
        folder: folds a layer.
        files: the adapter.
        decisions: per site.
        units: the layers that change, by path.
        result: what was written of a layer, by names in the checkpoint; None where it has not been folded yet.
        write: gets each layer that has been calibrated now, and what came of it.
        peers: processes that calibrate the same layers, each with inputs of its own. All of them round and none but the
            first has to write.
    """

    folder: Folder
    files: AdapterFiles
    decisions: Decisions
    units: Mapping[str, Fold]
    result: Callable[[str], Mapping[str, Tensor] | None]
    write: Callable[[str, Folded], None]
    peers: Peers = field(default_factory=Peers)
    _under_way: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    _left: set[str] = field(default_factory=set)
    _exact: dict[str, bool] = field(default_factory=dict)
    _plan: Plan | None = None

    @torch.no_grad()
    def run(self, batches: Sequence[Inputs], spill: Spill | None = None) -> None:
        """Do it.

        Args:
            batches: the inputs.
            spill: where their hidden states are kept; None: in memory.

        Raises:
            FoldError: the model reads the weight of a layer that it does not call.
        """
        paths = [s.entry.site.module for s in self.decisions.sites if s.action == "calibrate"]
        self._exact = {e.site.module: self._is_exact(e) for e in self.decisions.plan if e.site.is_layer}
        (model, weights), (beside, others) = self._model(folded=True), self._model(folded=False)
        gc.collect()  # tokenizers and texts are not needed any more
        trim()
        layers, at = {model.get_submodule(p): p for p in paths}, [""]

        def fold(layer: nn.Module, shown: Shown | None) -> None:
            at[0] = layers[layer]
            self._fold(layers[layer], shown)
            drop_rotations(layer)
            weights.take(layer)  # it may have had its old ones

        def leave(layer: nn.Module, fellow: nn.Module | None) -> None:
            self._left.add(layers[layer])
            self._under_way.pop(layers[layer], None)
            weights.take(layer)
            if fellow is not None:
                drop_rotations(fellow)
                others.take(fellow)
            trim()
            gc.collect()  # weights of bitsandbytes know their layer; what was there before the run is no garbage

        fellows = [beside.get_submodule(p) for p in paths]
        try:
            with ieee_products():
                in_running_order(model, list(layers), batches, fold, (beside, fellows), leave, spill, peers=self.peers)
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error):  # which torch has no class of errors for
                raise
            raise cannot_run(at[0], error) from error
        finally:
            weights.take_all()
            others.take_all()

    def _fold(self, path: str, shown: Shown | None) -> None:
        written = self.result(path)
        if written is not None:
            self._under_way[path] = written
            return
        unit = self.units[path]
        lines, tensors = replace(self.folder, maps=self._maps()).fold(path, unit.sites, unit.stored, shown)
        if shown is None:
            lines = tuple(_not_reached(s) for s in lines)
        if self.peers.world > 1:
            self.peers.check_same("what was rounded", {n: digest(t) for n, t in tensors.items()}, APART)
        self._under_way[path] = tensors
        self.write(path, (lines, tensors))

    def _model(self, *, folded: bool) -> tuple[Any, Resident]:
        """One that can run, and what brings its layers their weights."""
        skeleton = self.folder.skeleton
        model: Any = shell(skeleton.model)
        make_buffers(model)
        program = Program.of(model)
        if self._plan is None:
            self._plan = self.decisions.plan
            if names_inputs(model) and not self.files.is_ours:  # as where an adapter is loaded into a model
                self._plan = with_readers(program.with_(plan=self._plan)).planned
        InsertRotations(_ADAPTER).run(program.with_(plan=self._plan))
        for path in (p for p, exact in self._exact.items() if exact):  # before the first call, which asks for a forward
            use_exact(model.get_submodule(path))
        turned = {s.entry.fqn for s in self.decisions.sites if s.action in _STILL_TURNED or not folded}
        for fqn, placement in list(rotated_sites(model)):
            rotation = placement.rotations[_ADAPTER]
            rotation.skew = nn.Parameter(torch.empty_like(rotation.skew, device="cpu"), requires_grad=False)
            rotation.set_every_skew(self.files.skews[fqn])
            rotation.forget()
            if fqn not in turned:
                placement.drop()
        sizes = {path: sum(t.nbytes for t in stored) for path, stored in skeleton.stored.items()}
        layers = {p: m for p, m in model.named_modules() if p in sizes or _is_empty(m)}

        def bring(path: str, layer: nn.Module) -> None:
            self._bring(model, path, layer, folded=folded)

        return model.eval(), Resident(layers, bring, sizes, room_of(sizes))

    def _is_exact(self, entry: SitePlan) -> bool:
        """Whether a layer's own forward is not to be relied on: of some that is seen when they have their weights."""
        path, skeleton = entry.site.module, self.folder.skeleton
        layer = skeleton.layer(path)
        skeleton.fill(Holder(skeleton.model, {path: layer}), skeleton.stored.get(path, ()), self._maps())
        return choose_kernel(layer, entry.spec.kernel)[0] == "exact"

    def _bring(self, model: Any, path: str, layer: nn.Module, *, folded: bool) -> None:
        skeleton, maps = self.folder.skeleton, self._maps()
        stored = skeleton.stored.get(path, ())
        new: Mapping[str, Tensor] = {}
        if path in self.units and (folded or path in self._left):
            new = self._under_way.get(path) or self.result(path) or {}
        holder = Holder(model, {path: layer})
        state = {t.name: maps.tensor(t) for t in stored if t.name not in new}
        # Copies: a loader may write into them (GPTQ's zeros), and the layer may be brought again.
        skeleton.fill_with(holder, state | {n: t.clone() for n, t in new.items()})
        if holder.get_submodule(path) is not layer:
            raise FoldError(
                f"{path}: its loader makes another layer of this {type(layer).__name__}; load the model and use "
                "oftfx.fold"
            )
        for name, tensor in layer._parameters.items():
            if tensor is not None and tensor.is_meta and (sources := skeleton.sources(f"{path}.{name}")):
                put(holder, f"{path}.{name}", maps.tensor(sources[0]))
        self.folder.put_whole(holder, path)
        known = format_of(layer)
        if known is not None and path in self._exact:
            known.prepare(layer)
        elif known is not None:
            known.hold_still(layer)

    def _maps(self) -> Maps:
        """Of its own for each layer that is filled: a loader may write into it, and it goes with the last tensor."""
        return Maps(self.folder.maps.directory)


def _is_empty(module: nn.Module) -> bool:
    """Whether it has a parameter without numbers: one that the checkpoint has under another name."""
    return any(p is not None and p.is_meta for p in module._parameters.values())


def _not_reached(line: SiteFold) -> SiteFold:
    if line.action != "requantized":
        return line
    warn(f"{line.fqn}: {NOT_REACHED}")
    return replace(line, note="; ".join(n for n in (line.note, NOT_REACHED) if n))
