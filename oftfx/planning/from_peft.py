"""PEFT's OFT configuration as rules. Verified against peft 0.21.2."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

import torch.nn as nn

from oftfx.errors import RuleError, warn
from oftfx.model.index import ModelIndex
from oftfx.model.site import Site
from oftfx.planning.peft_selection import Selection, whole_modules
from oftfx.planning.plans import Plan
from oftfx.planning.rules import Rule
from oftfx.rotation.spec import OFT

VERSION = "0.21.2"


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


def fields_of(config: Any, model: nn.Module) -> dict[str, Any]:
    """The fields of a live ``peft.OFTConfig``, with PEFT's targets for the architecture if it names none.

    Raises:
        RuleError: not an OFT configuration, or one without targets for a model that PEFT knows none for.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "OFT":
        raise RuleError(f"a PEFT configuration of type {kind}; only OFTConfig can be used as rules")
    values = dict(vars(config))
    values["peft_version"] = values.get("peft_version") or VERSION  # a live object has today's meaning
    if values["target_modules"] is None:
        values["target_modules"] = _default_targets(model)
    return values


def rules_from_config(config: Mapping[str, Any], index: ModelIndex) -> tuple[Rule, ...]:
    """Rules for the fields of a ``peft.OFTConfig``: they select the sites that PEFT would.

    ``modules_to_save`` and ``bias`` become ``train`` and ``train_bias`` of `oftfx.transform`.

    Raises:
        RuleError: layers are asked for where PEFT would pass over that.
    """
    selection = Selection.of(config)
    if selection.layers and isinstance(selection.target, str):
        raise RuleError(
            f"layers_to_transform={config['layers_to_transform']} with target_modules={selection.target!r}: PEFT asks "
            "only targets of a list for their layer, and would rotate all. Say the layers in the expression, or give "
            "a list of names"
        )
    if selection.exclude and not any(selection.excludes(p) for every in index.paths.values() for p in every):
        given = selection.exclude if isinstance(selection.exclude, str) else sorted(selection.exclude)
        warn(f"exclude_modules={given}: {type(index.model).__name__} has no such module, so nothing is excluded")
    spec = spec_from_config(config)
    if selection.is_all_linear and not selection.exclude and not selection.whole:
        return (Rule("all-linear", spec),)

    def selected(site: Site) -> bool:
        if selection.is_all_linear:
            return site.is_linear and site.is_layer and not site.is_head and not selection.excludes(site.fqn)
        return selection.selects(site.fqn)

    shown = selection.target if isinstance(selection.target, str) else sorted(selection.target)
    selected.__qualname__ = f"OFTConfig(target_modules={shown})"
    return (Rule(selected, spec),)


def trained_by_config(config: Mapping[str, Any], index: ModelIndex) -> tuple[tuple[str, ...], str]:
    """What a configuration trains besides rotations: paths of modules, and which biases, in our word."""
    bias = config.get("bias") or "none"
    return whole_modules(config, index), "oft" if bias == "oft_only" else bias


def check_storage(config: Any, plan: Plan) -> None:
    """Warn where ``fan_in_fan_out=True`` is said of a layer that stores its weight as ``(out, in)``; PEFT does too."""
    other = [e for e in plan if e.site.kind != "conv1d_gpt2"]
    if getattr(config, "fan_in_fan_out", False) and other:
        warn(
            f"fan_in_fan_out=True, but {other[0].fqn} is a {other[0].site.module_class}; how a layer stores its weight "
            "is read from the layer"
        )


def configured_sites(config: Mapping[str, Any], sites: Iterable[str]) -> set[str]:
    """Those of the model's sites that a configuration names one by one or by regular expression; all of them are in a
    complete file. Of ``"all-linear"`` PEFT decides by the layers' classes, so nothing is expected.
    """
    selection = Selection.of(config)
    if not selection.target or selection.is_all_linear:
        return set()
    return {s for s in sites if selection.selects(s)}


def _default_targets(model: nn.Module) -> str | list[str]:
    """What PEFT takes for an architecture when a configuration names no targets."""
    advice = "give target_modules, e.g. target_modules='all-linear'"
    kind = getattr(getattr(model, "config", None), "model_type", None)
    try:
        known = import_module("peft.utils.constants").TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING
    except (ImportError, AttributeError):
        raise RuleError(
            f"this OFTConfig names no target_modules, and there is no peft here to ask what it takes; {advice}"
        ) from None
    if kind not in known:
        raise RuleError(
            f"this OFTConfig names no target_modules, and PEFT has none for {type(model).__name__} "
            f"(model_type {kind!r}); {advice}"
        )
    return known[kind]


def _version(text: object) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", str(text or ""))
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)
