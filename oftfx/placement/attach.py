"""Put a placement on a layer."""

from __future__ import annotations

import torch.nn as nn

from oftfx.formats.bnb4_experts import Bnb4Experts
from oftfx.model.site import Site
from oftfx.model.sites import format_at
from oftfx.placement.base import Placement
from oftfx.placement.computed import RotateComputed
from oftfx.placement.input import RotateInput
from oftfx.placement.output import RotateOutput
from oftfx.placement.weight import RotateWeight


def attach(modules: dict[str, nn.Module], site: Site, placement: str, *, each: bool = False) -> Placement:
    """A new placement of a site, its hooks registered."""
    module = modules[site.module]
    stored = None if site.is_layer else format_at(module, site, each=each)
    result: Placement
    if site.layout.side == "output" and placement == "activation":
        result = RotateOutput(site.fqn, module, parameter=site.parameter, format=stored)
    elif placement == "weight" and isinstance(stored, Bnb4Experts):
        result = RotateComputed(site.fqn, module, parameter=site.parameter, format=stored)
    elif placement == "weight":
        reader = None if site.reader is None else modules[site.reader]
        result = RotateWeight(site.fqn, module, parameter=site.parameter, format=stored, reader=reader)
    else:
        axis, groups = (-1, 1) if site.kind in ("linear", "conv1d_gpt2", "experts") else channels(module)
        result = RotateInput(site.fqn, module, parameter=site.parameter, format=stored, axis=axis, groups=groups)
    result.register()
    return result


def channels(module: nn.Module) -> tuple[int, int]:
    """Axis of a convolution's input channels, counted from the end, and its groups."""
    return -1 - len(module.kernel_size), module.groups  # type: ignore[arg-type, return-value]
