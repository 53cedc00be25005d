"""Torch's own encoder: keep it from a path that only frozen layers can take."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from oftfx.model.running import input_name


def watch_encoders(model: nn.Module) -> None:
    """Let every `nn.TransformerEncoder` with rotations inside stay dense where gradients flow.

    In eval mode it packs a padded batch into a nested tensor if nothing that it looks at requires gradients. It does
    not look into rotations, and its attention does not take what they make of such a tensor.
    """
    for encoder in _encoders(model):
        if _stay_dense not in encoder._forward_pre_hooks.values():
            encoder.register_forward_pre_hook(_stay_dense, with_kwargs=True)


def unwatch_encoders(model: nn.Module) -> None:
    """Take that back."""
    for encoder in _encoders(model):
        for key in [k for k, h in encoder._forward_pre_hooks.items() if h is _stay_dense]:
            del encoder._forward_pre_hooks[key]
            encoder._forward_pre_hooks_with_kwargs.pop(key, None)


def _encoders(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]


def _stay_dense(
    encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not torch.is_grad_enabled() or not any(p.requires_grad for p in encoder.parameters()):
        return None
    name = None if args else input_name(encoder, kwargs)
    src = args[0] if name is None else kwargs[name]
    if src.requires_grad or src.is_nested:
        return None
    src = src.detach().requires_grad_()  # which is what it looks at
    return ((src, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: src})
