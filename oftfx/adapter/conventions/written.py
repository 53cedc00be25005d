"""What every convention that writes has to ask of an adapter first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.conventions.base import Convention, Outgoing
from oftfx.adapter.conventions.orthogonal import blocks_of_skew
from oftfx.errors import AdapterError
from oftfx.planning.site_plan import SitePlan


def check_sites(
    adapter: Outgoing,
    convention: Convention,
    *,
    side: Literal["input", "output"],
    kinds: Sequence[str],
    scales: bool = False,
) -> None:
    """Refuse what a convention has no place for.

    Args:
        adapter: what is to be written.
        convention: how.
        side: of the layers that it rotates.
        kinds: of layers that it knows.
        scales: whether it has scales of rows, so that weights of the adapter's own may be said; see `scale_of`.

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
    said = {e.site.weight_name for e in plan if scales and e.fqn in adapter.weights}
    if own := [n for n in (*plan.train, *plan.brought, *plan.train_buffers) if n not in said]:
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


def scale_of(adapter: Outgoing, entry: SitePlan, q: Tensor, convention: str) -> Tensor | None:
    """Scale of each row, ``(out,)``, that a weight of the adapter's own stands for; None where it has none.

    Args:
        adapter: what is to be written.
        entry: the site.
        q: of its rotation, ``(blocks, b, b)``, float64.
        convention: for the message.

    Raises:
        AdapterError: that weight is no scaled base weight.
    """
    if entry.fqn not in adapter.weights:
        return None
    own, base = (t.cpu().double().flatten(1) for t in adapter.weights[entry.fqn])
    if entry.site.turns_outputs:  # own = R s R^T base
        r = blocks_of_skew(q).transpose(1, 2)
        own, base = (torch.bmm(r, t.unflatten(0, r.shape[:2])).flatten(0, 1) for t in (own, base))
    scale = (own * base).sum(1) / (base * base).sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    if not (error := float((own - scale[:, None] * base).norm() / own.norm())) <= 1e-6:
        raise AdapterError(
            f"{entry.fqn}: the adapter has a weight of its own which is not the base's with scaled rows (off by a "
            f"relative {error:.2g}), and convention {convention!r} has no place for another. Write convention='oftfx'"
        )
    return scale
