"""What every kernel is launched with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor


def is_interpreted(kernel: Any) -> bool:
    """Whether a kernel is run by Triton's interpreter, as ``TRITON_INTERPRET`` asked when it was defined."""
    return not isinstance(kernel, triton.JITFunction)


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its operands are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
