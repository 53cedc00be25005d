"""Float8 codes, also of layers whose weight a cast of the whole model (``.float()``) has turned into floats."""

from __future__ import annotations

import torch
from torch import Tensor

from oftfx.errors import FormatError

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def to_bytes(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes as bytes, uint8 in the shape of the weight, never a view of it.

    A float8 number is one in float16, bfloat16 and float32 as well, so a cast is undone exactly.

    Args:
        weight: codes as ``dtype``, or the same numbers in a wider dtype.
        dtype: float8.

    Raises:
        FormatError: the numbers are no longer float8: something was added to them.
    """
    codes = weight.detach().to(dtype)
    if weight.dtype != dtype and not torch.equal(codes.to(weight.dtype), weight.detach()):
        raise FormatError(
            f"a weight {tuple(weight.shape)} of float8 codes was cast to {weight.dtype} and has changed since then, so "
            "its scales no longer say what it stands for; load the checkpoint again without casting the model"
        )
    return codes.view(torch.uint8).clone()


def from_bytes(codes: Tensor, dtype: torch.dtype, like: Tensor) -> Tensor:
    """The weight of bytes of float8 ``dtype``, in the dtype that ``like`` has."""
    return codes.contiguous().view(dtype).to(like.dtype)


def power_of_two(scale: Tensor) -> Tensor:
    """The next power of two, so that no code saturates; float32 to float32, powers of two stay."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
