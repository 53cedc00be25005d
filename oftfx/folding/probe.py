"""Whether a layer whose class has a forward of its own still computes with its weight the way its kind does."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

_STANDARD = (
    *(nn.Linear, nn.Embedding),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a subclass computes something of its own, so that a fold has to be verified."""
    if type(module).__name__ == "Conv1D":
        return False
    return not any(type(module).forward is base.forward for base in _STANDARD)


def probe(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """An input of the layer and what it makes of it; None where it cannot be called with one tensor."""
    x = _input(module)
    try:
        out = module(x)
    except Exception:
        # Whatever a forward of another signature raises: it cannot be probed, which the caller reports.
        return None
    return (x, out) if isinstance(out, torch.Tensor) else None


def _input(module: Any) -> torch.Tensor:
    weight = module.weight
    generator = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Embedding):
        return torch.arange(min(4, module.num_embeddings), device=weight.device).unsqueeze(0)
    if isinstance(module, nn.Linear):
        shape = [4, module.weight.shape[1]]
    else:
        sizes = [k * d + 4 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        shape = [2, module.in_channels, *sizes]
    return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)
