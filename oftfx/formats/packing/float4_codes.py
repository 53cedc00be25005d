"""4-bit floats two in a byte, and scales that are bare exponents, as the OCP microscaling formats have them."""

from __future__ import annotations

import torch
from torch import Tensor

from oftfx.formats.packing.float8_codes import power_of_two

_BIAS = 127
_LARGEST = 2 * _BIAS  # 255 stands for no number


def from_nibbles(packed: Tensor) -> Tensor:
    """Codes of bytes, the first in the low bits: uint8 ``(..., n)`` to uint8 ``(..., 2 n)``."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def to_nibbles(codes: Tensor) -> Tensor:
    """Inverse of `from_nibbles`; the number of codes in a row is even."""
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def from_exponents(stored: Tensor) -> Tensor:
    """Float32 scales ``2^(e - 127)`` of bytes; NaN for 255."""
    powers = torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.to(torch.int32) - _BIAS)
    return torch.where(stored > _LARGEST, torch.nan, powers)


def to_exponents(scale: Tensor) -> Tensor:
    """Inverse of `from_exponents`, for float32 powers of two."""
    return (torch.frexp(scale)[1] + (_BIAS - 1)).clamp(0, _LARGEST).to(torch.uint8)


def stored_power(scale: Tensor) -> Tensor:
    """The power of two, of those that a byte holds, to which a float32 scale is rounded up."""
    return power_of_two(scale.clamp(2.0**-_BIAS, 2.0**_BIAS))
