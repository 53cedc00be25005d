"""What every convention that writes has to ask of an adapter first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn as nn

from oftfx.adapter.conventions.base import Convention, Outgoing
from oftfx.errors import AdapterError
from oftfx.planning.site_plan import SitePlan


def check_sites(
    adapter: Outgoing, convention: Convention, *, side: Literal["input", "output"], kinds: Sequence[str]
) -> None:
    """Refuse what a convention has no place for.

    Raises:
        AdapterError: rotations on the other side, layers of another kind, or anything besides rotations.
    """
    name, plan = convention.name, adapter.plan
    for entry in plan:
        if entry.site.turns_outputs != (side == "output"):
            does, can = ("outputs", "inputs") if side == "input" else ("inputs", "outputs")
            raise AdapterError(
                f"{entry.fqn}: this adapter rotates the layer's {does}, and convention {name!r} "
                f"({convention.made_by}) its {can}, which is another function of the weight. Fold it instead, or "
                "write convention='oftfx'"
            )
        if entry.site.kind not in kinds or (not entry.site.is_layer and not entry.site.turns_outputs):
            raise AdapterError(
                f"{entry.fqn} is a {entry.site.module_class} ({entry.site.kind}); convention {name!r} knows "
                f"{', '.join(kinds)}. Write convention='oftfx'"
            )
    if own := (*plan.train, *plan.brought, *plan.train_buffers):
        raise AdapterError(
            f"this adapter has {own[0]} of its own besides its rotations, and convention {name!r} has no place for "
            "that. Write convention='oftfx'"
        )


def check_convolution(entry: SitePlan, module: nn.Module, convention: str) -> None:
    """Refuse a Conv2d with groups or dilation, which writers of rotated patches do not take.

    Raises:
        AdapterError: it has.
    """
    if isinstance(module, nn.Conv2d) and (module.groups != 1 or set(module.dilation) != {1}):
        raise AdapterError(
            f"{entry.fqn} has groups={module.groups}, dilation={module.dilation}; convention {convention!r} knows "
            "neither. Write convention='oftfx'"
        )
