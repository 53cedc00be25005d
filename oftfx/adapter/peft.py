"""PEFT's convention: its OFT configuration as rules, and its adapter files. Verified against peft 0.21.2.

``adapter_model.safetensors`` holds ``base_model.model.<site>.oft_R.weight`` (the skew, as here), and under
``base_model.model.<name>`` what trains whole, with ``.base_layer`` before the bias of a rotated layer.
``adapter_config.json`` says how the skew becomes a rotation; the size of its blocks is read from the tensor, because
PEFT stores the size that was asked for and silently uses another where that does not divide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn as nn

from oftfx.errors import AdapterError, AdapterFileError, RuleError
from oftfx.model.site import Site
from oftfx.plans import Plan
from oftfx.rotation.spec import OFT, nearest_divisor
from oftfx.rules import Rule

PREFIX = "base_model.model."
SKEW, EMBEDDING_SKEW = ".oft_R.weight", ".oft_embedding_R.weight"
VERSION = "0.21.2"
CONFIG_FILE, WEIGHT_FILE = "adapter_config.json", "adapter_model.safetensors"


def spec_from_config(config: Mapping[str, Any]) -> OFT:
    """The `OFT` that an OFT configuration stands for.

    ``cayley_neumann`` meant another series before PEFT 0.18, which is also the first version that writes its number.
    """
    series = "cayley_neumann" if _version(config.get("peft_version")) >= (0, 18) else "cayley_neumann_016"
    blocks, size = config.get("r") or None, config.get("oft_block_size") or None
    return OFT(
        None if blocks else size,
        blocks=blocks,
        parameterization=series if config.get("use_cayley_neumann", True) else "cayley",  # type: ignore[arg-type]
        terms=config.get("num_cayley_neumann_terms", 5),
        block_share=bool(config.get("block_share")),
        coft_eps=config.get("eps", 6e-5) if config.get("coft") else None,
        dropout=config.get("module_dropout", 0.0),
        init="identity" if config.get("init_weights", True) else "normal",
        on_indivisible="nearest",
    )


def rules_from_config(config: Any) -> tuple[Rule, ...]:
    """Rules for a ``peft.OFTConfig``: targets, exclusions and layer numbers select the sites PEFT would.

    ``modules_to_save`` and ``bias`` become ``train`` and ``train_bias`` of `oftfx.transform`.

    Raises:
        RuleError: not an OFT configuration, no ``target_modules``, or a field that has no meaning here.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "OFT":
        raise RuleError(f"a PEFT configuration of type {kind}; only OFTConfig can be used as rules")
    if config.target_modules is None:
        raise RuleError("this OFTConfig names no target_modules; give them, e.g. target_modules='all-linear'")
    if config.fan_in_fan_out:
        raise RuleError("fan_in_fan_out=True: how a layer stores its weight is read from the layer; leave it False")
    values = dict(vars(config))
    values.setdefault("peft_version", VERSION)
    values["peft_version"] = values["peft_version"] or VERSION  # a live object has today's meaning
    target = config.target_modules
    if target == "all-linear" and config.exclude_modules is None and config.layers_to_transform is None:
        return (Rule("all-linear", spec_from_config(values)),)

    def selected(site: Site) -> bool:
        if config.exclude_modules is not None and _named(config.exclude_modules, site.fqn):
            return False
        if target == "all-linear":
            chosen = site.is_linear and site.is_layer and not site.is_head
        else:
            chosen = _named(target, site.fqn)
        return chosen and _in_layers(site.fqn, config.layers_to_transform, config.layers_pattern)

    selected.__qualname__ = f"OFTConfig(target_modules={target if isinstance(target, str) else sorted(target)})"
    return (Rule(selected, spec_from_config(values)),)


def configured_sites(config: Mapping[str, Any], sites: Iterable[str]) -> set[str]:
    """Those of the model's sites that a configuration names one by one or by regular expression; all of them are in a
    complete file. Of ``"all-linear"`` PEFT decides by the layers' classes, so nothing is expected.
    """
    target = config.get("target_modules")
    if not target or target == "all-linear":
        return set()
    excluded, layers, pattern = (config.get(k) for k in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    return {
        s
        for s in sites
        if _named(target, s) and not (excluded and _named(excluded, s)) and _in_layers(s, layers, pattern)
    }


def _named(wanted: str | Iterable[str], fqn: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds paths or their last parts."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, fqn) is not None
    return any(fqn == w or fqn.endswith(f".{w}") for w in wanted)


def _in_layers(fqn: str, layers: int | Iterable[int] | None, pattern: str | Iterable[str] | None) -> bool:
    if layers is None or layers == []:
        return True
    names = [pattern] if isinstance(pattern, str) else list(pattern or ())
    searches = [rf".*\.{re.escape(n)}\.(\d+)\." for n in names] or [r".*?\.[^.]*\.(\d+)\."]
    for search in searches:
        if found := re.match(search, fqn):
            return int(found.group(1)) in ([layers] if isinstance(layers, int) else list(layers))
    return False


def _version(text: str | None) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", text or "")
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


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
            raise AdapterFileError(f"{where}: key {key!r} does not start with {PREFIX!r}; this is not a PEFT OFT file")
        name = key.removeprefix(PREFIX)
        if name.endswith((SKEW, EMBEDDING_SKEW)):
            skews[name.removesuffix(SKEW).removesuffix(EMBEDDING_SKEW)] = key
        elif foreign := _FOREIGN.search(name):
            raise AdapterFileError(
                f"{where}: key {key!r} ({foreign.group(0).strip('._')}) is not of PEFT's OFT format >= 0.16, the one "
                "that is read here"
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
        if entry.site.kind in ("experts", "functional") or not entry.site.is_layer:
            raise AdapterError(
                f"PEFT's layout knows layers only, not the parameter {entry.fqn}. Save with layout='oftfx'"
            )
        differing = [k for k in _SHARED if getattr(entry.spec, k) != getattr(spec, k)]
        if differing or entry.block_size != _peft_block_size(spec, entry.site.in_features):
            what = differing[0] if differing else "block_size"
            raise AdapterError(
                f"PEFT's layout has one {what} for all sites; {entry.fqn} differs from {plan.entries[0].fqn}. "
                "Save with layout='oftfx', or give the groups of sites an adapter each"
            )
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": getattr(getattr(root, "config", None), "_name_or_path", None) or None,
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
        "modules_to_save": list(plan.train_modules) or None,
        "num_cayley_neumann_terms": spec.terms,
        "oft_block_size": 0 if spec.blocks else spec.block_size,
        "peft_type": "OFT",
        "peft_version": VERSION,
        "r": spec.blocks or 0,
        "revision": None,
        "target_modules": _targets(plan, root),
        "task_type": None,
        "use_cayley_neumann": spec.parameterization != "cayley",
    }
    if spec.parameterization == "cayley_neumann_016":
        del config["peft_version"]  # PEFT then knows that the file has the old meaning
    return config


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


_SHARED = ("block_size", "blocks", "parameterization", "terms", "block_share", "coft_eps", "dropout")


def _peft_block_size(spec: OFT, in_features: int) -> int:
    if spec.blocks is not None:
        return in_features // nearest_divisor(in_features, spec.blocks)
    assert spec.block_size is not None
    return nearest_divisor(in_features, spec.block_size)


def _targets(plan: Plan, root: nn.Module) -> list[str]:
    """Last parts of the paths where those select exactly the plan's sites, else whole paths."""
    sites = {e.fqn for e in plan}
    ends = sorted({fqn.rpartition(".")[2] for fqn in sites})
    selected = {n for n, _ in root.named_modules() if n and _named(ends, n)}
    return ends if selected == sites else sorted(sites)
