"""PEFT's adapter files, to write and to read. Verified against peft 0.21.2.

``adapter_model.safetensors`` holds ``base_model.model.<site>.oft_R.weight`` (the skew, as here), and under
``base_model.model.<name>`` what trains whole, with ``.base_layer`` before the bias of a rotated layer.
``adapter_config.json`` says how the skew becomes a rotation; the size of its blocks is read from the tensor, because
PEFT stores the size that was asked for and silently uses another where that does not divide.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

import torch.nn as nn

from oftfx.errors import AdapterError, AdapterFileError, warn
from oftfx.model.site import Site
from oftfx.model.structure import is_own_module
from oftfx.planning.from_peft import VERSION
from oftfx.planning.peft_selection import named
from oftfx.planning.plans import Plan
from oftfx.rotation.spec import OFT, nearest_divisor

PREFIX = "base_model.model."
SKEW, EMBEDDING_SKEW = ".oft_R.weight", ".oft_embedding_R.weight"
CONFIG_FILE, WEIGHT_FILE = "adapter_config.json", "adapter_model.safetensors"
PLAN_FILE = "oftfx_plan.json"
"""Beside the tensors in our own convention, in the place of PEFT's configuration."""


def key_of_skew(site: Site) -> str:
    """File key of a site's skew."""
    return f"{PREFIX}{site.fqn}{EMBEDDING_SKEW if site.kind == 'embedding' else SKEW}"


def key_of_parameter(name: str, rotated: Iterable[str]) -> str:
    """File key of a parameter that trains whole; PEFT wraps rotated layers, which shows in the key."""
    owner, _, leaf = name.rpartition(".")
    return f"{PREFIX}{owner}.base_layer.{leaf}" if owner in set(rotated) else PREFIX + name


def read_keys(keys: Iterable[str], where: str) -> tuple[dict[str, str], dict[str, str]]:
    """Sort file keys into ``{site: key}`` and ``{parameter name: key}``.

    Raises:
        AdapterFileError: a key of another kind of adapter, named with what it looks like.
    """
    skews, parameters = {}, {}
    for key in keys:
        if not key.startswith(PREFIX):
            raise AdapterFileError(
                f"{where}: key {key!r} does not start with {PREFIX!r}; this is not a PEFT OFT file. "
                "oftfx.load_adapter reads other conventions"
            )
        name = key.removeprefix(PREFIX)
        if name.endswith((SKEW, EMBEDDING_SKEW)):
            skews[name.removesuffix(SKEW).removesuffix(EMBEDDING_SKEW)] = key
        elif foreign := _FOREIGN.search(name):
            raise AdapterFileError(
                f"{where}: key {key!r} ({foreign.group(0).strip('._')}) is not of PEFT's OFT format >= 0.16, the one "
                "that is read here. oftfx.load_adapter reads other conventions, and save_adapter writes what it read "
                "as this one"
            )
        else:
            parameters[name.replace(".base_layer.", ".")] = key
    if not skews:
        raise AdapterFileError(f"{where}: no key ends with {SKEW!r}; the file holds no OFT rotation")
    return skews, parameters


_FOREIGN = re.compile(r"lora_\w+|hada_\w+|lokr_\w+|oft_r\b|oft_s\b|oft_blocks|oft_diag|boft_\w+|ia3_\w+")


def config_for(plan: Plan, root: nn.Module) -> dict[str, Any]:
    """``adapter_config.json`` for a plan.

    Raises:
        AdapterError: the plan's sites differ in ways that one PEFT configuration cannot say.
    """
    spec = plan.entries[0].spec
    for entry in plan:
        if entry.site.turns_outputs:
            raise AdapterError(
                f"{entry.fqn}: this adapter rotates what the layer gives out, and PEFT's OFT what it reads, which is "
                "another function of the weight. Save with convention='oftfx', or fold it"
            )
        if entry.site.kind in ("experts", "functional") or not entry.site.is_layer:
            raise AdapterError(
                f"PEFT's convention knows layers only, not the parameter {entry.fqn}. Save with convention='oftfx'"
            )
        differing = [k for k in _SHARED if getattr(entry.spec, k) != getattr(spec, k)]
        if differing or entry.block_size != _peft_block_size(spec, entry.site.in_features):
            what = differing[0] if differing else "block_size"
            raise AdapterError(
                f"PEFT's convention has one {what} for all sites; {entry.fqn} differs from {plan.entries[0].fqn}. "
                "Save with convention='oftfx', or give the groups of sites an adapter each"
            )
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": base_name(root),
        "bias": {"oft": "oft_only"}.get(plan.train_bias, plan.train_bias),
        "block_share": spec.block_share,
        "coft": spec.coft_eps is not None,
        "eps": spec.coft_eps if spec.coft_eps is not None else 6e-5,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "module_dropout": spec.dropout,
        "modules_to_save": whole_modules(plan, root) or None,
        "num_cayley_neumann_terms": spec.terms,
        "oft_block_size": 0 if spec.blocks else spec.block_size,
        "peft_type": "OFT",
        "peft_version": VERSION,
        "r": spec.blocks or 0,
        "revision": None,
        "target_modules": targets(plan, root),
        "task_type": None,
        "use_cayley_neumann": spec.parameterization != "cayley",
    }
    if spec.parameterization == "cayley_neumann_016":
        del config["peft_version"]  # PEFT then knows that the file has the old meaning
    return config


def base_name(root: nn.Module) -> str | None:
    """What a transformers model was loaded from."""
    return getattr(getattr(root, "config", None), "_name_or_path", None) or None


def unusable_reason(site: Site, module: nn.Module) -> str:
    """Why PEFT itself cannot use the rotation of a site, though its file format can hold it; empty where it can."""
    if site.kind in ("conv1d", "conv3d", "conv_transpose", "conv1d_gpt2"):
        return f"it does not know {type(module).__name__} layers"
    if site.kind != "conv2d":
        return ""
    kernel: Any = module.kernel_size
    if max(kernel) > 1:
        return "its forward is wrong for kernels larger than 1 on inputs larger than the kernel"
    return "it rotates all groups together" if module.groups != 1 else ""


def nearest(fqn: str, sites: Iterable[str]) -> str:
    """What to say where a file rotates a layer that the model does not have."""
    known = list(sites)
    close = difflib.get_close_matches(fqn, known, 2, 0.5)
    return f"Nearest: {', '.join(close)}" if close else f"It has {len(known)} layers that can be rotated"


def warn_of_unusable(plan: Plan, root: nn.Module) -> None:
    """Warn where a file is right and PEFT itself cannot use it."""
    reasons = {e.fqn: unusable_reason(e.site, root.get_submodule(e.site.module)) for e in plan}
    if found := {n: r for n, r in reasons.items() if r}:
        name, reason = next(iter(found.items()))
        warn(
            f"PEFT cannot use this adapter at {len(found)} sites, e.g. {name}: {reason}; oftfx reads it back. "
            "convention='oftfx' says so in its name"
        )


_SHARED = ("block_size", "blocks", "parameterization", "terms", "block_share", "coft_eps", "dropout")


def _peft_block_size(spec: OFT, in_features: int) -> int:
    found = nearest_divisor(in_features, spec.asked)
    return found if spec.blocks is None else in_features // found


def whole_modules(plan: Plan, root: nn.Module) -> list[str]:
    """Ends of paths that select exactly the modules that train whole; PEFT compares letters, not parts of paths."""
    paths = [n for n, m in root.named_modules(remove_duplicate=False) if n and not is_own_module(m)]
    modules = dict(root.named_modules(remove_duplicate=False))
    whole = {id(modules[path]) for path in plan.train_modules}
    for ends in ({p.rpartition(".")[2] for p in plan.train_modules}, plan.train_modules):
        if {id(modules[p]) for p in paths if p.endswith(tuple(ends))} == whole:
            return sorted(ends)
    also = next(p for p in paths if p.endswith(plan.train_modules) and id(modules[p]) not in whole)
    raise AdapterError(
        f"PEFT's convention names a module that trains whole by the end of its path, and that of {also} ends with "
        f"{next(p for p in plan.train_modules if also.endswith(p))!r}, so PEFT would train it as well. Save with "
        "convention='oftfx'"
    )


def targets(plan: Plan, root: nn.Module) -> list[str]:
    """Last parts of the paths where those select exactly the plan's sites, else whole paths."""
    sites = {e.fqn for e in plan}
    ends = sorted({fqn.rpartition(".")[2] for fqn in sites})
    selected = {n for n, _ in root.named_modules() if n and named(ends, n)}
    return ends if selected == sites else sorted(sites)
