"""``oft_R.weight`` without a configuration: OneTrainer's OFT and sd-scripts' networks.oft_v2.

The skew of PEFT 0.18 and later, five terms of the series, with two differences: a Conv2d computes ``W' = W @ R`` of its
flattened patches, where PEFT has ``W @ R^T``; and OneTrainer's ``oft_R.scaled_oft`` divides the skew by ``2 sqrt(b -
1)``. Transposing R is the same as negating the skew, in the series as well. One row for a layer of several blocks is
shared. sd-scripts notes its bound on norms in its arguments, as PEFT's COFT; OneTrainer has none.

By the formulas of their files of 2026.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from oftfx.adapter.conventions.base import Contents, Foreign, Outgoing, Target, Turn, Written, only
from oftfx.adapter.conventions.names import resolve, written_name
from oftfx.adapter.conventions.source import Source
from oftfx.adapter.conventions.written import check_convolution, check_sites
from oftfx.adapter.peft_files import PREFIX
from oftfx.errors import AdapterError, AdapterFileError
from oftfx.model.site import Site
from oftfx.rotation.cayley import project
from oftfx.rotation.module import whole
from oftfx.rotation.skew import skew_matrix, skew_size, skew_vector
from oftfx.rotation.spec import OFT
from oftfx.typed_json import parsed

SKEW, SCALED = ".oft_R.weight", ".oft_R.scaled_oft"
FLAT = ("lora_unet_", "lora_transformer_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")
DOTTED = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "clip_l.", "clip_g.")
_KINDS = ("linear", "conv2d")


class OFTv2(Foreign):
    """Of both tools."""

    name = "oft_v2"
    made_by = "OneTrainer, sd-scripts"

    def recognizes(self, source: Source) -> bool:
        """By flattened names, or by what only these tools write; with dots alone it may be diffusers' as well."""
        keys = [k for k in source.heads if k.endswith(SKEW)]
        return (
            bool(keys) and "lora_adapter_metadata" not in source.notes and not any(k.startswith(PREFIX) for k in keys)
        )

    def read(self, source: Source, target: Target) -> Contents:
        """Skews; the bound on norms goes with them."""
        only(source, (SKEW, SCALED), self.name)
        names = [k.removesuffix(SKEW) for k in source.heads if k.endswith(SKEW)]
        if stray := next((k for k in source.heads if k.removesuffix(SCALED).removesuffix(SKEW) not in names), None):
            raise AdapterFileError(f"{source.named(stray)} is of no layer with {SKEW[1:]}; is the file complete?")
        paths, remarks = resolve(source, names, target, (*FLAT, *DOTTED))
        eps = _bound(source)
        turns = {fqn: self._turn(source, name, target.sites[fqn], target, eps) for name, fqn in paths.items()}
        return Contents(turns, remarks=remarks)

    def _turn(self, source: Source, name: str, site: Site, target: Target, eps: float | None) -> Turn:
        module = target.modules[site.module]
        if site.kind not in _KINDS or getattr(module, "groups", 1) != 1:
            raise AdapterError(f"{source.path}: rotates {site.fqn}, a {site.module_class}, which {self.made_by} cannot")
        rows, size = skew_shape(source, name + SKEW, site)
        skew = source.wide(name + SKEW)
        if name + SCALED in source.heads:
            if eps is not None:
                raise AdapterFileError(f"{source.path}: has {SCALED[1:]} and a bound on norms; no tool writes both")
            if source.heads[name + SCALED].dtype == "I64":
                raise AdapterFileError(
                    f"{source.named(name + SCALED)} is an integer, as a trial version of OneTrainer had it, which "
                    "scaled otherwise; released versions write a boolean. Save it again with the OneTrainer that "
                    "made it"
                )
            skew = skew / (2 * math.sqrt(size - 1))
        shared = rows == 1 and rows * size != site.in_features
        spec = OFT(size, block_share=shared, coft_eps=eps)
        return Turn(spec, -skew if site.kind == "conv2d" else skew)

    def write(self, adapter: Outgoing) -> Written:
        """The series of five terms only; a bound on norms is applied to the numbers."""
        check_sites(adapter, self, side="input", kinds=_KINDS)
        tensors: dict[str, Tensor] = {}
        for entry in adapter.plan:
            check_convolution(entry, adapter.root.get_submodule(entry.site.module), self.name)
            spec, rotation = entry.spec, adapter.rotations[entry.fqn]
            if (spec.parameterization, spec.terms) != ("cayley_neumann", 5):
                raise AdapterError(
                    f"{entry.fqn}: convention {self.name!r} has a series of five terms, this rotation is "
                    f"{spec.parameterization} with {spec.terms}; another R would come of its numbers. Write "
                    "convention='peft'"
                )
            skew = whole(rotation.every_skew()).detach().cpu()
            if spec.coft_eps is not None:
                skew = skew_vector(project(skew_matrix(skew, entry.block_size), spec.coft_eps))
            taken = {k.removesuffix(SKEW): None for k in tensors}
            key = written_name(adapter, entry.fqn, FLAT[0], (*FLAT, *DOTTED), taken) + SKEW
            tensors[key] = (-skew if entry.site.kind == "conv2d" else skew).float().contiguous()
        return Written(tensors, {"ss_network_module": "networks.oft_v2"})


def skew_shape(source: Source, key: str, site: Site) -> tuple[int, int]:
    """Rows and block size of a skew, from the header.

    Raises:
        AdapterFileError: no skew of this layer.
    """
    shape = source.heads[key].shape
    size = (1 + math.isqrt(1 + 8 * shape[-1])) // 2 if len(shape) == 2 else 0
    if (
        not size
        or skew_size(size) != shape[-1]
        or site.in_features % size
        or shape[0] not in (1, site.in_features // size)
    ):
        raise AdapterFileError(
            f"{source.named(key)} has shape {shape}; {site.fqn} with in_features {site.in_features} needs (blocks, "
            "b (b - 1) / 2) with blocks * b = in_features, or one row for all. Is it an adapter of another model?"
        )
    return shape[0], size


def _bound(source: Source) -> float | None:
    """The bound on norms that sd-scripts has noted."""
    try:
        noted: Any = parsed(source.notes.get("ss_network_args") or "{}")
        arguments = dict(noted)
        asked = str(arguments.get("oft_coft", arguments.get("coft"))).lower() in ("1", "true", "yes", "y", "on")
        return float(arguments.get("coft_eps", 6e-5)) if asked else None
    except (ValueError, TypeError) as error:
        raise AdapterFileError(f"{source.path}: ss_network_args in its metadata is damaged: {error}") from None
