"""How a rotation acts in front of a layer: a forward pre-hook, so the layer, its class and its names stay."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn

from oftfx.errors import OftfxError
from oftfx.rotation.module import FrozenRotation, Rotation, SharedRotation

CHILD = "oft"
"""Name of the child module of a site that holds its rotations."""


class SiteRotations(nn.Module):
    """The rotations that live at a site, one child an adapter. It only holds them; `RotateInput` applies them."""

    def forward(self, *_: Any, **__: Any) -> Any:
        """Not meant to be called; a container like ModuleList."""
        raise OftfxError("an `oft` child only holds rotations; call the layer it belongs to")


class RotateInput:
    """Forward pre-hook of a site: ``x -> x @ R1 @ R2 ...`` for the active adapters, in their order.

    Attributes:
        site: path of the site.
        fixed: rotations that a fold left in front of a quantized weight; they are the layer's own and act first.
        rotations: adapter name to rotation; one that lives here or, where sites share an input, at another site.
        active: names of the adapters that act, in order; names this site does not know are passed over.
        ran: whether the hook has been called at all; a layer used other than by calling it never does.
    """

    def __init__(self, site: str) -> None:
        self.site = site
        self.fixed: list[FrozenRotation] = []
        self.rotations: dict[str, Rotation] = {}
        self.active: tuple[str, ...] = ()
        self.ran = False

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Replace the layer's input, given by position or by name."""
        self.ran = True
        if not self.active and not self.fixed:
            return None
        if args:
            return (self.rotate(args[0]), *args[1:]), kwargs
        name = "input" if "input" in kwargs else next(iter(inspect.signature(module.forward).parameters))
        return args, {**kwargs, name: self.rotate(kwargs[name])}

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Apply what acts to ``x (..., in_features)``."""
        for rotation in self.in_effect():
            shared = isinstance(rotation, (SharedRotation, FrozenRotation))
            x = rotation(x, self.site) if shared else rotation(x)
        return x

    def in_effect(self) -> list[Rotation | FrozenRotation]:
        """The rotations that act now, in order."""
        return [*self.fixed, *(self.rotations[n] for n in self.active if n in self.rotations)]


def attach(module: nn.Module, site: str) -> RotateInput:
    """The hook of a layer; made and registered where it has none, after the pre-hooks that are there."""
    hook = rotate_input_of(module)
    if hook is None:
        hook = RotateInput(site)
        module.register_forward_pre_hook(hook, with_kwargs=True)
    return hook


def rotate_input_of(module: nn.Module) -> RotateInput | None:
    """The hook of a layer, or None."""
    return next((h for h in module._forward_pre_hooks.values() if isinstance(h, RotateInput)), None)


def hold(module: nn.Module, adapter: str, rotation: nn.Module) -> None:
    """Make a rotation a child of its site: ``<site>.oft.<adapter>``."""
    holder = module._modules.get(CHILD)
    if holder is None:
        holder = SiteRotations().train(module.training)
        module.add_module(CHILD, holder)
    elif not isinstance(holder, SiteRotations):
        raise OftfxError(f"{type(module).__name__} already has a child called {CHILD!r} that is not ours")
    holder.add_module(adapter, rotation.train(module.training))


def detach(module: nn.Module, adapter: str | None = None) -> None:
    """Remove one adapter's rotation from a layer, or all and the fixed ones; hook and holder once nothing is left."""
    hook = rotate_input_of(module)
    holder = module._modules.get(CHILD)
    if hook is None:
        return
    if adapter is None:
        hook.rotations.clear()
        hook.fixed.clear()
    else:
        hook.rotations.pop(adapter, None)
    hook.active = tuple(n for n in hook.active if n in hook.rotations)
    if isinstance(holder, SiteRotations):
        for name in [adapter] if adapter else list(holder._modules):
            holder._modules.pop(name, None)
        if not holder._modules:
            del module._modules[CHILD]
    if not hook.rotations and not hook.fixed:
        key = next(k for k, h in module._forward_pre_hooks.items() if h is hook)
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def rotated_sites(model: nn.Module) -> Iterator[tuple[str, nn.Module, RotateInput]]:
    """Every layer with a hook of ours: ``(path, layer, hook)``; each layer once."""
    for fqn, module in model.named_modules():
        hook = rotate_input_of(module)
        if hook is not None:
            yield fqn, module, hook


@contextmanager
def without_rotation(module: nn.Module) -> Iterator[None]:
    """The bare layer: inside, its hook does nothing."""
    hook = rotate_input_of(module)
    if hook is None:
        yield
        return
    active, fixed, ran = hook.active, hook.fixed, hook.ran
    hook.active, hook.fixed = (), []
    try:
        yield
    finally:
        hook.active, hook.fixed, hook.ran = active, fixed, ran
