"""PEFT 0.14 and 0.15: ``oft_r (r, b, b)`` and ``oft_s (out, 1)``. PEFT from 0.16 on refuses these files.

``R = (I - Q)(I + Q)^-1`` with ``Q = (A - A^T) / 2`` of ``oft_r``, and ``W' = diag(oft_s) W R^T``. COFT clips the norm
of each A, its symmetric part too, to ``eps ceil(out / r)^2 / sqrt(rows)``.

Verified against peft 0.14.0 and 0.15.2.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from oftfx.adapter import peft_files
from oftfx.adapter.conventions.base import Contents, Foreign, Outgoing, Target, Turn, Written
from oftfx.adapter.conventions.orthogonal import exact_skew
from oftfx.adapter.conventions.peft_config import by_layer, checked_config, read_others, required, rows_scale
from oftfx.adapter.conventions.source import Source
from oftfx.adapter.conventions.written import check_convolution, check_sites, scale_of
from oftfx.adapter.peft_files import PREFIX
from oftfx.errors import AdapterFileError
from oftfx.model.site import Site
from oftfx.rotation.skew import skew_vector
from oftfx.rotation.spec import OFT

ROTATION, SCALE = ".oft_r", ".oft_s"
_FIELDS = (
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "block_share",
    "coft",
    "eps",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "module_dropout",
    "modules_to_save",
    "oft_block_size",
    "peft_type",
    "r",
    "revision",
    "target_modules",
    "task_type",
)


class PEFT014(Foreign):
    """Of both versions."""

    name = "peft-0.14"
    made_by = "PEFT 0.14 and 0.15"
    is_directory = True

    def recognizes(self, source: Source) -> bool:
        """By its key, which no later version has."""
        return any(k.startswith(PREFIX) and k.endswith(ROTATION) for k in source.heads)

    def read(self, source: Source, target: Target) -> Contents:
        """Skews, and scales of rows."""
        config = checked_config(source, "OFT")
        layers, others = by_layer(source, target, (ROTATION, SCALE))
        turns = {}
        for fqn, keys in layers.items():
            site = target.sites[fqn]
            a = self._blocks(source, required(source, keys, ROTATION, fqn), site, config.get("block_share") is True)
            size = a.shape[-1]
            if config.get("coft"):
                blocks = site.in_features // size
                limit = float(config.get("eps", 6e-5)) * math.ceil(site.out_features / blocks) ** 2 / math.sqrt(len(a))
                norm = torch.linalg.matrix_norm(a, keepdim=True)
                a = torch.where(norm > limit, a * (limit / norm), a)
            as_number = config.get("r") == site.in_features // size
            spec = OFT(
                None if as_number else size,
                blocks=site.in_features // size if as_number else None,
                parameterization="cayley",
                block_share=config.get("block_share") is True,
                dropout=float(config.get("module_dropout") or 0.0),
            )
            scale = rows_scale(source, keys.get(SCALE), site.out_features)
            turns[fqn] = Turn(spec, skew_vector((a - a.transpose(1, 2)) / 2), scale=scale)
        return Contents(
            turns,
            read_others(source, others),
            config,
            unbounded="its bound on norms (COFT) is applied to the numbers that were read"
            if config.get("coft")
            else "",
        )

    def _blocks(self, source: Source, key: str, site: Site, shared: bool) -> Tensor:
        shape = source.heads[key].shape
        fits = len(shape) == 3 and shape[1] == shape[2] and shape[1] > 0 and site.in_features % shape[1] == 0
        if not fits or shape[0] != (1 if shared else site.in_features // shape[1]):
            raise AdapterFileError(
                f"{source.named(key)} has shape {shape}; {site.fqn} with in_features {site.in_features} needs (r, b, "
                f"b) with r * b = in_features{', one block for all' if shared else ''}. Is it an adapter of another "
                "model?"
            )
        return source.wide(key)

    def write(self, adapter: Outgoing) -> Written:
        """Of exact rotations with one setting for all."""
        check_sites(adapter, self, side="input", kinds=("linear", "conv2d"), scales=True)
        tensors: dict[str, Tensor] = {}
        for entry in adapter.plan:
            check_convolution(entry, adapter.root.get_submodule(entry.site.module), self.name)
            q = exact_skew(adapter.rotations[entry.fqn], entry.fqn, self.name)
            rows = q[:1] if entry.spec.block_share else q
            tensors[f"{PREFIX}{entry.fqn}{ROTATION}"] = rows.float().contiguous()
            scale = scale_of(adapter, entry, q, self.name)
            scale = torch.ones(entry.site.out_features) if scale is None else scale
            tensors[f"{PREFIX}{entry.fqn}{SCALE}"] = scale.float()[:, None].contiguous()
        exact = [replace(e, spec=replace(e.spec, parameterization="cayley", coft_eps=None)) for e in adapter.plan]
        config = peft_files.config_for(replace(adapter.plan, entries=tuple(exact)), adapter.root)
        return Written(tensors, config={k: v for k, v in config.items() if k in _FIELDS})
