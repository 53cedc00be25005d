"""Hooks of others on a rotated layer, which see other values once its rotation is in the weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from oftfx.placement.base import Placement
from oftfx.placement.input import RotateInput
from oftfx.placement.output import RotateOutput

_BLIND = ("bitsandbytes.nn.parametrize",)
"""Modules whose hooks look at no values."""


def hooks_remark(placement: Placement) -> str:
    """What a user should know of them; empty where none would notice."""
    layer = placement.reader
    pre, post = list(layer._forward_pre_hooks.values()), list(layer._forward_hooks.values())
    remarks = []
    if isinstance(placement, RotateInput):
        if later := _others(pre[pre.index(placement) + 1 :]):
            remarks.append(
                f"{len(later)} pre-hook(s) registered after the rotation ({_names(later)}) saw x @ R, see x now"
            )
        if reading := _others(post):
            remarks.append(f"{len(reading)} forward hook(s) ({_names(reading)}) saw x @ R as the input, see x now")
    if isinstance(placement, RotateOutput) and (earlier := _others(post[: post.index(placement)])):
        remarks.append(
            f"{len(earlier)} forward hook(s) before the rotation ({_names(earlier)}) saw the unrotated output, see the "
            "rotated one now; what they change is not rotated any more"
        )
    return "; ".join(remarks)


def _others(hooks: Iterable[Any]) -> list[Any]:
    seeing = [h for h in hooks if not isinstance(getattr(h, "__self__", h), Placement)]
    return [h for h in seeing if getattr(h, "__module__", None) not in _BLIND]


def _names(hooks: list[Any]) -> str:
    return ", ".join(sorted({getattr(h, "__qualname__", type(h).__qualname__) for h in hooks}))
