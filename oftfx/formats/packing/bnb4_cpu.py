"""bitsandbytes' own look-up of 4-bit codes on a CPU, where it gives the format's values to the bit and is quicker."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def looked_up(weight: Tensor, state: Any, scales: Tensor) -> Tensor | None:
    """``code[c] * absmax``, float32 ``(out, in)``; None where the package cannot be relied on.

    Args:
        weight: the layer's bytes, in the format's own layout.
        state: its QuantState.
        scales: one for each block, float32, without a second quantization.
    """
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # into what may be read without the package
    plain = weight.device.type == "cpu" and type(scales) is Tensor and not recorded
    # Its kernels for wide registers take several elements with the scale of the first.
    if not plain or len(state.shape) != 2 or state.shape[1] % state.blocksize:
        return None
    codes = tuple(state.code.tolist())
    if not _is_exact(state.quant_type, state.blocksize, codes):
        return None
    return _values(weight.reshape(-1).view(torch.uint8), scales, state.blocksize, state.quant_type, tuple(state.shape))


def _values(raw: Tensor, scales: Tensor, blocksize: int, kind: str, shape: tuple[int, int]) -> Tensor:
    return torch.ops.bitsandbytes.dequantize_4bit(
        raw.view(-1, 1), scales.contiguous(), blocksize, kind, shape, torch.float32
    )  # fmt: skip


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _is_exact(kind: str, blocksize: int, codes: tuple[float, ...]) -> bool:
    """Tried once, on all codes and on scales large and small: another version, or another CPU, may do otherwise."""
    numbers = torch.Generator().manual_seed(0)
    shape = (37, 2 * blocksize)
    count = shape[0] * shape[1]
    raw = torch.randint(256, (count // 2,), dtype=torch.uint8, generator=numbers, device="cpu")
    scales = torch.rand(count // blocksize, generator=numbers, device="cpu").mul_(6).sub_(3).exp_()
    scales[:3] = torch.tensor([0.0, 1e-38, 3e38], device="cpu")
    table = torch.tensor(codes, dtype=torch.float32, device="cpu")
    both = torch.stack([raw >> 4, raw & 15], dim=1).reshape(-1).int()
    expected = table.index_select(0, both).view(-1, blocksize) * scales.unsqueeze(1)
    try:
        found = _values(raw, scales, blocksize, kind, shape)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):  # an operator that is not there, or another
        return False
    same = found.dtype == torch.float32 and found.shape == shape
    return same and torch.equal(found.view(torch.int32), expected.view(shape).view(torch.int32))
