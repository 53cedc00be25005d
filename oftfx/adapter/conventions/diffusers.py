"""diffusers' names for PEFT's OFT: one file, keys from the model's own paths, PEFT's configuration in the metadata.

What ``model.add_adapter(OFTConfig(...))`` and ``model.save_lora_adapter(directory)`` of diffusers write; in files of
pipelines a part such as ``unet.`` stands before the paths. The numbers mean what they mean in PEFT.

Verified against diffusers 0.42.1 with peft 0.21.2.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from oftfx.adapter import peft_files
from oftfx.adapter.conventions.base import Contents, Foreign, Outgoing, Target, Turn, Written, only
from oftfx.adapter.conventions.names import resolve, written_name
from oftfx.adapter.conventions.oft_v2 import DOTTED, FLAT, SCALED, skew_shape
from oftfx.adapter.conventions.source import Source
from oftfx.adapter.conventions.written import check_sites
from oftfx.adapter.peft_files import EMBEDDING_SKEW, PREFIX, SKEW
from oftfx.errors import AdapterFileError
from oftfx.planning.from_peft import spec_from_config
from oftfx.planning.peft_fields import check_fields
from oftfx.rotation.module import whole
from oftfx.rotation.spec import OFT
from oftfx.typed_json import parsed

NOTE = "lora_adapter_metadata"


class Diffusers(Foreign):
    """Of models and of pipelines."""

    name = "diffusers"
    made_by = "diffusers with PEFT"

    def recognizes(self, source: Source) -> bool:
        """By the configuration in its metadata; without it, by names with dots, which OneTrainer can have as well."""
        keys = [k for k in source.heads if k.endswith(SKEW)]
        if not keys or any(k.startswith(PREFIX) for k in keys):
            return False
        tools = any(k.endswith(SCALED) for k in source.heads) or "ss_network_module" in source.notes
        return NOTE in source.notes or not (tools or any(k.startswith(FLAT) for k in keys))

    def read(self, source: Source, target: Target) -> Contents:
        """Skews, by the configuration; PEFT's defaults where there is none, which only an explicit choice gets here."""
        only(source, (SKEW, EMBEDDING_SKEW), self.name)
        config = self._config(source)
        ends = {k: k.removesuffix(SKEW).removesuffix(EMBEDDING_SKEW) for k in source.heads}
        paths, remarks = resolve(source, ends.values(), target, DOTTED)
        turns = {}
        for key, name in ends.items():
            if name in paths:
                site = target.sites[paths[name]]
                rows, size = skew_shape(source, key, site)
                spec = spec_from_config({**config, "r": 0, "oft_block_size": size})
                spec = OFT.from_dict({**spec.to_dict(), "on_indivisible": "error"})
                if rows == 1 and rows * size != site.in_features and not spec.block_share:
                    raise AdapterFileError(
                        f"{source.named(key)} has one row for all blocks, its configuration says one each"
                    )
                turns[paths[name]] = Turn(spec, source.wide(key))
        return Contents(turns, remarks=remarks)

    def _config(self, source: Source) -> dict[str, Any]:
        try:
            found = parsed(source.notes.get(NOTE) or '{"peft_type": "OFT", "peft_version": "0.18"}')
        except ValueError as error:
            raise AdapterFileError(f"{source.path}: {NOTE} in its metadata is damaged: {error}") from None
        # A pipeline's file has the fields of each part behind the part's name.
        parts = {k.rpartition(".")[0] for k in found} if isinstance(found, dict) else set()
        if len(parts) == 1:
            (part,) = parts
            found = {k.removeprefix(f"{part}.") if part else k: v for k, v in found.items()}
        if not isinstance(found, dict) or found.get("peft_type") != "OFT":
            raise AdapterFileError(f"{source.path}: {NOTE} in its metadata is no OFT configuration of one model")
        check_fields(found, f"{source.path}: {NOTE}", AdapterFileError)
        return found

    def write(self, adapter: Outgoing) -> Written:
        """As PEFT's, with the configuration in the metadata."""
        check_sites(adapter, self, side="input", kinds=("linear", "conv2d", "embedding"))
        config = peft_files.config_for(adapter.plan, adapter.root)
        peft_files.warn_of_unusable(adapter.plan, adapter.root)
        tensors: dict[str, Tensor] = {}
        for entry in adapter.plan:
            ending = EMBEDDING_SKEW if entry.site.kind == "embedding" else SKEW
            key = written_name(adapter, entry.fqn, "", DOTTED, {}) + ending
            skew = whole(adapter.rotations[entry.fqn].every_skew()).detach().cpu()
            tensors[key] = skew.clone(memory_format=torch.contiguous_format)
        return Written(tensors, {NOTE: json.dumps(config, indent=2, sort_keys=True)})
