"""Make one layer of a checkpoint real, fold it by the pass that folds models, and take its tensors out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FoldError
from oftfx.folding.checkpoint import ROTATION
from oftfx.folding.record import SiteFold
from oftfx.folding.reference import ReferenceWeights
from oftfx.folding.shown import Shown
from oftfx.formats.mxfp4_experts import BLOCKS, SCALES, Mxfp4Experts, packed_experts
from oftfx.passes.fold_rotations import FoldRotations
from oftfx.passes.insert_rotations import InsertRotations
from oftfx.passes.quantized.calibrate import Calibrate
from oftfx.passes.quantized.dequantize import activation_dtype
from oftfx.placement.find import rotated_sites
from oftfx.planning.plans import Plan
from oftfx.planning.program import Program
from oftfx.streaming.decisions import Decision
from oftfx.streaming.directory import Stored
from oftfx.streaming.maps import Maps
from oftfx.streaming.skeleton import Holder, Skeleton, put
from oftfx.streaming.transformers_loader import tensors_of

_ADAPTER = "default"


@dataclass(frozen=True)
class Folder:
    """Folds layers one by one.

    Attributes:
        skeleton: the model.
        maps: the checkpoint's tensors.
        skews: of the adapter, by site.
        whole: what it trained whole, by name in the model.
        reference: original float weights, for that policy.
    """

    skeleton: Skeleton
    maps: Maps
    skews: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]
    reference: ReferenceWeights | None

    @torch.no_grad()
    def fold(
        self, path: str, sites: Sequence[Decision], stored: Sequence[Stored], shown: Shown | None = None
    ) -> tuple[tuple[SiteFold, ...], dict[str, Tensor]]:
        """Fold all sites of a layer.

        Args:
            path: of the layer.
            sites: its rotated weights.
            stored: what the checkpoint has of it.
            shown: what it reads, for ``"calibrate"``.

        Returns:
            The lines of the report, and its tensors by their names in the checkpoint.

        Raises:
            FoldError: see `FoldRotations`; or its tensors could not be named.
        """
        layer = self.skeleton.layer(path)
        holder = self._holder(path, layer, sites)
        merged = any(self.skeleton.naming.how[t.name] == "model" for t in stored)
        self._fill(holder, path, sites, stored)
        zeros = _Zeros.of(layer, self._stored_zeros(stored))
        program = Program.of(holder)
        plan = Plan("", tuple(s.entry for s in sites))
        InsertRotations(_ADAPTER).run(program.with_(plan=plan))
        for fqn, placement in rotated_sites(holder):
            placement.rotations[_ADAPTER].set_every_skew(self.skews[fqn])
        done = self._folded(holder, sites[0].action, shown)
        if zeros is not None:
            zeros.restore(holder.get_submodule(path))
        remarks = {s.entry.fqn: s.remark for s in sites}
        lines = tuple(replace(d, note="; ".join(n for n in (remarks[d.fqn], d.note) if n)) for d in done)
        return lines, self._named(holder, path, stored, merged, sites)

    def _folded(self, holder: Holder, action: str, shown: Shown | None) -> Sequence[SiteFold]:
        program = Program.of(holder)
        if action == "calibrate":
            return Calibrate().fold_all(program, shown)
        policy = "keep" if action == "folded" else action
        return FoldRotations(policy, reference=self.reference).run(program).found.sites

    def _holder(self, path: str, layer: nn.Module, sites: Sequence[Decision]) -> Holder:
        layers = {path: layer}
        if sites[0].action == "float":  # the floats around it decide its dtype; two outvote a bias of its own
            others = nn.Module()
            dtype = activation_dtype(self.skeleton.model, self.skeleton.dtype)
            for name in ("a_weight", "b_weight"):
                others._parameters[name] = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            layers["others_of_the_model"] = others
        return Holder(self.skeleton.model, layers)

    def _fill(self, holder: Holder, path: str, sites: Sequence[Decision], stored: Sequence[Stored]) -> None:
        self.skeleton.fill(holder, stored, self.maps)
        own = {self.skeleton.naming.renamed[t.name] for t in stored}
        for site in sites:
            name = site.entry.site.weight_name
            if site.action == "folded" and name not in own:  # tied: it is stored under another name
                (source,) = self.skeleton.sources(name)
                put(holder, name, self.maps.tensor(source))
        self.put_whole(holder, path)

    def put_whole(self, holder: Holder, path: str) -> None:
        """Give a layer what the adapter has trained whole of it."""
        for name, value in self.whole.items():
            for known in (name, *self.skeleton.tied(name)):
                if known.rpartition(".")[0] == path:
                    put(holder, known, value.to(holder.get_parameter_or_buffer(known).dtype))

    def _stored_zeros(self, stored: Sequence[Stored]) -> Tensor | None:
        found = next((t for t in stored if t.name.endswith(".qzeros")), None)
        return None if found is None else Maps(self.maps.directory).tensor(found)

    def _named(
        self, holder: Holder, path: str, stored: Sequence[Stored], merged: bool, sites: Sequence[Decision]
    ) -> dict[str, Tensor]:
        naming = self.skeleton.naming
        state = tensors_of(holder, self.skeleton.quantizer, merged=merged)
        state = {n: t for n, t in state.items() if not ROTATION.search(n) and not t.is_meta}
        if merged:
            return state
        for name in (s.entry.site.weight_name for s in sites if s.format == Mxfp4Experts.name):
            found = packed_experts(state.pop(name))
            if found is None:
                raise FoldError(f"{name}: its fold gave values that MXFP4 does not have")
            state[name + BLOCKS], state[name + SCALES] = found
        plain = {naming.renamed[t.name]: t.name for t in stored if naming.how[t.name] == "plain"}
        prefix = _prefix(path, stored)
        named = {n: plain.get(n) or prefix + n.removeprefix(path) for n in state if n.startswith(f"{path}.")}
        return {named[n]: state[n] for n in named}


def _prefix(path: str, stored: Sequence[Stored]) -> str:
    """The path of a layer in its checkpoint, which may have the base model's prefix more or less."""
    for one in stored:
        above = one.name
        while "." in above:
            above = above.rpartition(".")[0]
            if above == path or path.endswith(f".{above}") or above.endswith(f".{path}"):
                return above
    return path


@dataclass(frozen=True)
class _Zeros:
    """GPTQ files of version 1 store each zero less one, and loaders add it; what is written is as the file was.

    Attributes:
        added: what the loader has added to each word.
    """

    added: int

    @classmethod
    def of(cls, layer: nn.Module, before: Tensor | None) -> _Zeros | None:
        now = layer._buffers.get("qzeros")
        if before is None or now is None or now.shape != before.shape or torch.equal(now, before):
            return None
        added = torch.unique((now.long() - before.long()) % 2**32)
        if len(added) != 1:
            raise FoldError(
                "the zeros of this GPTQ checkpoint of version 1 are not shifted by the same number in every word (3 "
                "bits); load the model, and use oftfx.fold and FoldResult.save"
            )
        return cls(int(added))

    def restore(self, layer: nn.Module) -> None:
        now = layer._buffers.get("qzeros")
        if now is not None:
            words = (now.long() - self.added) % 2**32
            layer._buffers["qzeros"] = torch.where(words >= 2**31, words - 2**32, words).to(now.dtype)
