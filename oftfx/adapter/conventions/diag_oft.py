"""``oft_blocks``: rotations of what a layer gives out, as kohya's networks.oft, LyCORIS and ComfyUI have them.

``W' = R^T W`` on the output channels, with ``R = (I + Q)(I - Q)^-1`` and ``Q = A - A^T`` of ``oft_blocks (k, b, b)``,
so here the skew is that of ``-Q`` and R the exact Cayley transform. ``alpha`` bounds the norm of all Q of a layer
together:

* LyCORIS: ``alpha * out``, where alpha > 0; ``rescale (out, 1, ...)`` multiplies the rows of the result.
* kohya: ``alpha * out``, always; one alpha for the file.
* ComfyUI: ``alpha`` itself, where > 0. What it does with ``rescale`` depends on whether it trains or applies a file.

With four dimensions, ``oft_blocks (m, k, b, b)`` are BOFT's factors, ``W' = F_m ... F_1 W``: each is ``P diag(R) P^T``
and turns groups of ``b * 2^i`` channels, so their product has blocks of ``b * 2^(m-1)``, dense, and is made one
rotation.

Verified against lycoris-lora 4.1.3, and by the formulas of kohya's and ComfyUI's files of 2026.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oftfx.adapter.conventions.base import Contents, Foreign, Outgoing, Target, Turn, Written, check_shape, only
from oftfx.adapter.conventions.names import resolve, written_name
from oftfx.adapter.conventions.orthogonal import blocks_of_skew, butterfly, exact_skew, turn_of
from oftfx.adapter.conventions.source import Source
from oftfx.adapter.conventions.written import check_sites, scale_of
from oftfx.errors import AdapterError, AdapterFileError
from oftfx.model.site import Site
from oftfx.rotation.skew import skew_vector
from oftfx.rotation.spec import OFT

BLOCKS, RESCALE, ALPHA = ".oft_blocks", ".rescale", ".alpha"
_KINDS = ("linear", "conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class DiagOFT(Foreign):
    """One of the three writers.

    Attributes:
        name: LyCORIS, kohya or ComfyUI.
        made_by: in full.
        prefixes: of its keys; the first is written.
        module: what ``ss_network_module`` says in files of kohya's trainer.
        kinds: of layers that it knows.
    """

    name: str  # type: ignore[misc]
    made_by: str  # type: ignore[misc]
    prefixes: tuple[str, ...]
    module: str = ""
    kinds: tuple[str, ...] = _KINDS

    def recognizes(self, source: Source) -> bool:
        """By the prefix of its keys, or by what the trainer has noted; by the tensors alone the three look the same."""
        keys = [k for k in source.heads if k.endswith(BLOCKS) or f"{BLOCKS}." in k]
        noted = source.notes.get("ss_network_module", "")
        if not keys:
            return False
        if any(k.startswith(p) for k in keys for _, others in WRITERS for p in others):
            mine = any(k.startswith(self.prefixes) for k in keys)
            return mine or (bool(self.module) and noted == self.module)
        return not noted or noted == self.module

    def read(self, source: Source, target: Target) -> Contents:
        """Skews, and the rows' scales."""
        if nested := next((k for k in source.heads if f"{BLOCKS}." in k), None):
            raise AdapterFileError(
                f"{source.named(nested)} is one of several rotations of a fused layer (kohya's networks.oft_flux), "
                "which oftfx does not read"
            )
        only(source, (BLOCKS, RESCALE, ALPHA), self.name)
        names = [k.removesuffix(BLOCKS) for k in source.heads if k.endswith(BLOCKS)]
        paths, remarks = resolve(source, names, target, self.prefixes)
        stray = [k for k in source.heads if k.rpartition(".")[0] not in names]
        if stray:
            raise AdapterFileError(f"{source.named(stray[0])} is of no layer with {BLOCKS[1:]}; is the file complete?")
        one = self._alphas(source, paths)
        turns = {fqn: self._turn(source, n, target.sites[fqn], one[n]) for n, fqn in paths.items()}
        bound = "its bound on norms (alpha) is applied to the numbers that were read"
        return Contents(turns, remarks=remarks, unbounded=bound if any(one.values()) else "")

    def _alphas(self, source: Source, names: dict[str, str]) -> dict[str, float]:
        keys = {n: n + ALPHA for n in names if n + ALPHA in source.heads}
        if wrong := next((k for k in keys.values() if source.heads[k].shape not in ((), (1,))), None):
            raise AdapterFileError(f"{source.named(wrong)} has shape {source.heads[wrong].shape}, expected one number")
        found = {n: float(source.wide(k)) for n, k in keys.items()}
        if self.name == "kohya":
            if len(found) != len(names):
                raise AdapterFileError(
                    f"{source.path}: {min(set(names) - set(found))} has no alpha, which bounds its norm"
                )
            if len(set(found.values())) > 1:
                raise AdapterFileError(
                    f"{source.path}: its alphas differ ({min(found.values()):.3g} to {max(found.values()):.3g}); "
                    "kohya's networks.oft takes the first for all, so it is not known what was meant"
                )
        return {n: found.get(n, 0.0) for n in names}

    def _turn(self, source: Source, name: str, site: Site, alpha: float) -> Turn:
        if site.kind not in self.kinds:
            raise AdapterError(f"{source.path}: rotates {site.fqn}, a {site.module_class}, which {self.made_by} cannot")
        key = name + BLOCKS
        factors = len(source.heads[key].shape) == 4 and self.name != "kohya"
        check_shape(source, key, site, site.out_features, dims=4 if factors else 3)
        a = source.wide(key)
        q = self._bounded(a - a.transpose(-1, -2), alpha, site.out_features)
        scale = self._rescale(source, name, site)
        if not factors:
            return Turn(OFT(q.shape[-1], parameterization="cayley"), skew_vector(-q), "output", scale=scale)
        if (size := q.shape[-1]) % 2:
            raise AdapterFileError(f"{source.named(key)}: BOFT's blocks have an even size, these {size}")

        def order(i: int) -> Tensor:
            return torch.arange(site.out_features).view(-1, 2, 2**i * size // 2).transpose(1, 2).flatten()

        # W' = B W with rotations R = (I + Q)(I - Q)^-1; here outputs are turned by W' = R^T W.
        product = butterfly(blocks_of_skew(-q), order, source.named(key))
        return turn_of(product.transpose(1, 2), source.named(key), side="output", scale=scale)

    def _bounded(self, q: Tensor, alpha: float, out: int) -> Tensor:
        """``Q`` within the norm that alpha allows, by each writer's own formula."""
        norm = torch.linalg.vector_norm(q)
        if self.name == "kohya":
            return q * ((norm.clamp(max=alpha * out) + 1e-8) / (norm + 1e-8))
        limit = alpha if self.name == "comfyui" else alpha * out
        norm = norm + 1e-8
        return q * (limit / norm) if 0 < limit < norm else q

    def _rescale(self, source: Source, name: str, site: Site) -> Tensor | None:
        key = name + RESCALE
        if key not in source.heads:
            return None
        shape = source.heads[key].shape
        if self.name == "kohya" or shape[:1] != (site.out_features,) or any(n != 1 for n in shape[1:]):
            raise AdapterFileError(f"{source.named(key)} has shape {shape}: no scale of the rows of {site.fqn}")
        scale = source.wide(key).reshape(-1)
        if bool((scale == 1).all()):
            return None
        if self.name == "comfyui":
            raise AdapterFileError(
                f"{source.named(key)}: ComfyUI trains with a rescale and leaves it out when it applies a file, so it "
                "is not known which is meant. If LyCORIS wrote it: convention='lycoris'"
            )
        return scale

    def write(self, adapter: Outgoing) -> Written:
        """Only rotations of outputs can be said, so only what was read from such a file."""
        check_sites(adapter, self, side="output", kinds=self.kinds, scales=self.name == "lycoris")
        tensors: dict[str, Tensor] = {}
        skews = {e.fqn: exact_skew(adapter.rotations[e.fqn], e.fqn, self.name) for e in adapter.plan}
        alpha = 0.0
        if self.name == "kohya":
            # Above every norm, so that nothing is clipped; it has one number of blocks and one alpha for all layers.
            norms = {e.fqn: float(skews[e.fqn].norm()) / e.site.in_features for e in adapter.plan}
            alpha = 1.001 * max(max(norms.values()), 1e-6)
            if len({e.blocks for e in adapter.plan}) > 1:
                differing = next(e for e in adapter.plan if e.blocks != adapter.plan.entries[0].blocks)
                raise AdapterError(
                    f"{differing.fqn} has {differing.blocks} blocks and {adapter.plan.entries[0].fqn} "
                    f"{adapter.plan.entries[0].blocks}; convention 'kohya' has one number for all"
                )
        for entry in adapter.plan:
            if self.name == "lycoris" and entry.block_size > entry.blocks:
                raise AdapterError(
                    f"{entry.fqn} has {entry.blocks} blocks of {entry.block_size}; LyCORIS takes the smaller number "
                    "for the size, so it would refuse the file"
                )
            taken = {k.removesuffix(BLOCKS): None for k in tensors}
            name = written_name(adapter, entry.fqn, self.prefixes[0], self.prefixes, taken)
            tensors[name + BLOCKS] = torch.triu(-skews[entry.fqn]).float().contiguous()
            tensors[name + ALPHA] = torch.tensor(alpha)
            scale = scale_of(adapter, entry, skews[entry.fqn], self.name)
            if scale is not None:
                ones = [1] * (adapter.weights[entry.fqn][0].dim() - 1)
                tensors[name + RESCALE] = scale.float().reshape(-1, *ones).contiguous()
        return Written(tensors, {"ss_network_module": self.module} if self.module else {})


WRITERS = (
    ("lycoris", ("lora_unet_", "lycoris_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_")),
    ("kohya", ("oft_unet_",)),
    ("comfyui", ("diffusion_model.",)),
)
_PREFIXES = dict(WRITERS)
LYCORIS = DiagOFT("lycoris", "LyCORIS", ("lycoris_", *_PREFIXES["lycoris"]), module="lycoris.kohya")
KOHYA = DiagOFT("kohya", "kohya's networks.oft", _PREFIXES["kohya"], module="networks.oft", kinds=("linear", "conv2d"))
COMFYUI = DiagOFT("comfyui", "ComfyUI", (*_PREFIXES["comfyui"], "text_encoders."))
