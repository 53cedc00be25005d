"""What accelerate hangs on a module (``device_map``, offloading): where it runs, and what is away between its calls.

Read by names; the package is never imported.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

HOOK, FORWARD = "_hf_hook", "_old_forward"
"""Attributes of a module that accelerate has placed: its hook, and the forward that its own one calls."""


def place_of_forward(module: nn.Module) -> str:
    """Where the forward of an instance stands; accelerate has one of its own there, and calls what was there before."""
    return FORWARD if FORWARD in vars(module) else "forward"


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """Its hooks on a module, one behind another."""
    hook = vars(module).get(HOOK)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def runs_on(module: nn.Module) -> torch.device | None:
    """The device to which it moves a module's inputs; None where it does not."""
    devices = (getattr(hook, "execution_device", None) for hook in hooks_of(module))
    found = next((d for d in devices if d is not None), None)
    return None if found is None else torch.device(found)


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module has its parameters only while it runs."""
    return any(getattr(hook, "offload", False) for hook in hooks_of(module))


def keep_here(module: nn.Module, hook: Any) -> None:
    """Undo what a hook has done to the parameters of a module that is small and trains; inputs are still moved.

    What is offloaded is a copy that the hook throws away after each call, and nothing an optimiser writes would stay.
    """
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "offload", False):
            each.detach_hook(module)
            each.offload = False
            if each.execution_device is not None:
                module.to(each.execution_device)
