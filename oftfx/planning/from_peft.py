"""PEFT's OFT configuration as rules. Verified against peft 0.21.2."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from oftfx.errors import RuleError
from oftfx.model.site import Site
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
        if config.exclude_modules is not None and named(config.exclude_modules, site.fqn):
            return False
        if target == "all-linear":
            chosen = site.is_linear and site.is_layer and not site.is_head
        else:
            chosen = named(target, site.fqn)
        return chosen and _in_layers(site.fqn, config.layers_to_transform, config.layers_pattern)

    selected.__qualname__ = f"OFTConfig(target_modules={target if isinstance(target, str) else sorted(target)})"
    return (Rule(selected, spec_from_config(values)),)


def trained_by_config(config: Any) -> tuple[tuple[str, ...], str]:
    """What an ``OFTConfig`` trains besides rotations: names of modules, and which biases, in our word."""
    bias = config.bias
    return tuple(config.modules_to_save or ()), "oft" if bias == "oft_only" else bias


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
        if named(target, s) and not (excluded and named(excluded, s)) and _in_layers(s, layers, pattern)
    }


def named(wanted: str | Iterable[str], fqn: str) -> bool:
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
