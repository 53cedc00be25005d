"""Arithmetic in the dtype that was chosen for it, whatever autocast says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast inside, on a device; the meta device has none, and torch does not take its name for one."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def product_dtype(x: Tensor) -> torch.dtype:
    """In what torch would multiply ``x``: autocast lowers torch's own products only, and none of float64."""
    kind = x.device.type
    on = kind != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype
