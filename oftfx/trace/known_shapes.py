"""Calls whose result needs no run on fake tensors: nearly all of a recording's time goes into those."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from oftfx.placement.find import placements_on
from oftfx.trace.torch_private import CALL

_SCALARS = (type(None), bool, int, float, str, torch.dtype)
_OF_EVERY_MODULE = {*vars(nn.Module()), CALL}


def is_bare_linear(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether a call is ``x @ W^T + b`` and nothing else: torch's own layer, no hook but ours, no cast on the way."""
    if type(module) is not nn.Linear or "forward" in vars(module) or module._forward_hooks:
        return False
    weight = module._parameters.get("weight")
    fits = type(weight) is nn.Parameter and weight.dtype == x.dtype and weight.shape[1:] == x.shape[-1:]
    ours = len(placements_on(module)) == len(module._forward_pre_hooks)
    return fits and ours and not _autocasts()


def kind_of_call(module: nn.Module, x: torch.Tensor) -> Any:
    """What decides the shape that a small module makes of one tensor, comparable between modules; None where unknown.

    Layers repeat: norms and activations of one class, with equal settings and parameters of equal shape, do the same to
    inputs of equal shape.
    """
    if module._modules or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return None
    own = {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE}
    if not all(map(_is_setting, own.values())) or not all(type(s) is int for s in x.shape):
        return None
    tensors = [*module._parameters.items(), *module._buffers.items()]
    held = tuple((n, None if t is None else (tuple(t.shape), t.dtype, t.requires_grad)) for n, t in tensors)
    given = tuple(x.shape), x.dtype, x.device, x.requires_grad, torch.is_grad_enabled(), _autocasts()
    return type(module), module.training, tuple(own.items()), held, given


def made(x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, differentiable: bool) -> torch.Tensor:
    """A tensor like what a layer makes of ``x``; one with gradients is no leaf, so that it can be written to."""
    result = x.new_empty(shape, dtype=dtype)
    return result.requires_grad_().clone() if differentiable else result


def _autocasts() -> bool:
    return any(map(torch.is_autocast_enabled, ("cpu", "cuda")))


def _is_setting(value: Any) -> bool:
    return isinstance(value, _SCALARS) or (isinstance(value, tuple) and all(map(_is_setting, value)))
