"""LoRA in PEFT's files: which sites it can do, the tensors of each, and the configuration. Verified against 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn as nn
from torch import Tensor

from oftfx.adapter.peft_files import PREFIX, base_name, targets, whole_modules
from oftfx.model.site import Site
from oftfx.placement.base import Placement
from oftfx.planning.from_peft import VERSION
from oftfx.planning.peft_selection import named
from oftfx.planning.plans import Plan
from oftfx.rotation.accelerate import is_offloaded

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


def unable(site: Site, placement: Placement) -> str:
    """Why PEFT's LoRA cannot stand for the rotation of a site; empty where it can."""
    module: Any = placement.module
    if not site.is_layer:
        return "LoRA is of layers that are called, and other code reads this weight"
    if site.kind not in ("linear", "conv1d_gpt2", "embedding", *_CONVOLUTIONS):
        return f"PEFT's LoRA knows no layers of kind {site.kind!r}"
    if placement.fixed:
        return "a rotation that an earlier fold has left in front of its weight acts first"
    if is_offloaded(module):
        return "accelerate has offloaded its weight"
    if site.kind == "embedding" and module.max_norm is not None:
        return "an embedding with max_norm shortens its rows, and would those of LoRA as well"
    if site.kind in _CONVOLUTIONS:
        if module.groups != 1:
            return f"its channels are in {module.groups} groups; PEFT's LoRA mixes them"
        if any(d > 1 and k > 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)):
            return "PEFT's LoRA forgets its dilation"
        if module.padding_mode != "zeros" and any(k > 1 for k in module.kernel_size):
            return f"PEFT's LoRA pads with zeros, not by {module.padding_mode!r}"
    return ""


def tensors_of(site: Site, module: nn.Module, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The two tensors of a site by their file keys.

    Args:
        site: it.
        module: the layer.
        a: ``(rank, in)``.
        b: ``(out, rank)``.
    """
    where = f"{PREFIX}{site.fqn}"
    if site.kind == "embedding":
        return {f"{where}.lora_embedding_A": a, f"{where}.lora_embedding_B": b}
    if site.kind in _CONVOLUTIONS:
        found: Any = module
        kernel = found.kernel_size
        a, b = a.view(len(a), found.in_channels, *kernel), b.view(*b.shape, *(1 for _ in kernel))
    return {f"{where}.lora_A.weight": a, f"{where}.lora_B.weight": b}


def config_for(plan: Plan, root: nn.Module, ranks: Mapping[str, int]) -> dict[str, Any]:
    """``adapter_config.json``.

    ``lora_alpha`` is the rank everywhere, so nothing is scaled, also by readers that know no patterns; ``r`` is the
    largest rank, as servers make room by it.
    """
    largest = max(ranks.values())
    patterns = {f"^{_escaped(fqn)}": rank for fqn, rank in ranks.items() if rank != largest}
    return {
        "alpha_pattern": patterns,
        "auto_mapping": None,
        "base_model_name_or_path": base_name(root),
        "bias": {"oft": "lora_only"}.get(plan.train_bias, plan.train_bias),
        "exclude_modules": None,
        "fan_in_fan_out": any(e.site.kind == "conv1d_gpt2" for e in plan),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "modules_to_save": whole_modules(plan, root) or None,
        "peft_type": "LORA",
        "peft_version": VERSION,
        "r": largest,
        "rank_pattern": patterns,
        "revision": None,
        "target_modules": _targets(plan, root),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _targets(plan: Plan, root: nn.Module) -> list[str] | str:
    """Names that select exactly the plan's sites; a regular expression where a path is the end of another one."""
    found, sites = targets(plan, root), {e.fqn for e in plan}
    if {n for n, _ in root.named_modules() if n and named(found, n)} == sites:
        return found
    return "|".join(f"({_escaped(fqn)})" for fqn in sorted(sites))


def _escaped(fqn: str) -> str:
    return fqn.replace(".", r"\.")
