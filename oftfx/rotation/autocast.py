"""Arithmetic in the dtype that was chosen for it, whatever autocast says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast inside, on a device; the meta device has none, and torch does not take its name for one."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
