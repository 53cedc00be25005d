"""A few numbers of the base's weights beside an adapter, by which another base of the same shapes is told."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch
import torch.nn as nn

from oftfx.errors import warn
from oftfx.formats.registry import format_of
from oftfx.formats.sharded import is_sharded
from oftfx.planning.plans import Plan
from oftfx.planning.site_plan import SitePlan
from oftfx.typed_json import parsed

KEY = "oftfx_base_sketch"
"""In the metadata of the weights; PEFT does not look at it, and its own files have none."""

_SITES, _ROWS, _COLUMNS = 6, 4, 16
_ALIKE = 0.7
"""Least cosine. Measured, four random layers: the same base in four bits 0.99, in two bits 0.9; another one, 0.1."""


@torch.no_grad()
def sketch_of(root: nn.Module, plan: Plan) -> str:
    """The corner of some sites' weights, dequantized, as JSON; empty where none can be read here."""
    found = {entry.fqn: numbers for entry in _some(plan) if (numbers := _corner(root, entry))}
    return json.dumps(found) if found else ""


def check_base(root: nn.Module, plan: Plan, notes: Mapping[str, str], where: str) -> None:
    """Warn where an adapter was made for another base: the shapes fit, and the outputs would mean nothing.

    Args:
        root: the model.
        plan: of the adapter.
        notes: metadata of the weights.
        where: the file, for the message.
    """
    try:
        known = {str(k): [float(x) for x in v] for k, v in parsed(notes.get(KEY, "") or "{}").items()}
    except (ValueError, TypeError, AttributeError, OverflowError):
        return  # somebody else's note
    pairs = [
        (a, b)
        for entry in plan
        if entry.fqn in known and (here := _corner(root, entry)) and len(here) == len(known[entry.fqn])
        for a, b in zip(known[entry.fqn], here, strict=True)
    ]
    size = math.sqrt(sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs))
    if not size or not math.isfinite(size):
        return
    cosine = sum(a * b for a, b in pairs) / size
    if cosine < _ALIKE:
        warn(
            f"{where} was made for another base: the weights noted there and those of this {type(root).__name__} have "
            f"a cosine of {cosine:.2f}. Its shapes fit, but what it learnt does not"
        )


def _some(plan: Plan) -> list[SitePlan]:
    entries = [e for e in plan if e.site.is_layer]
    return entries[:: max(1, -(-len(entries) // _SITES))]


def _corner(root: nn.Module, entry: SitePlan) -> list[float]:
    module = root.get_submodule(entry.site.module)
    known = format_of(module)
    own = module._parameters.get("weight")
    if known is None or is_sharded(own) or any(t is not None and t.is_meta for t in module._parameters.values()):
        return []
    weight = known.borrow(module)
    if weight.is_meta or weight.dim() != 2:
        return []
    return [float(f"{x:.3g}") for x in weight[:_ROWS, :_COLUMNS].flatten().tolist()]
