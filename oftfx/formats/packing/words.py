"""Codes of 2 to 8 bits in 32-bit words, always along the last axis: as a bit stream, in bit planes, or interleaved."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_WORD, _BYTE = 32, 8
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Bits a code to the widths of its planes, from the lowest bits up."""
_INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)
"""The code that each four bits of a word hold, from the lowest up."""


def from_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes of a little-endian bit stream: code ``j`` begins at bit ``j * bits`` of its row and may cross words.

    Args:
        words: int32 ``(..., words)``.
        bits: 1 to 8.
        count: codes in a row; what the last word holds beyond them is dropped.

    Returns:
        int16 ``(..., count)``.
    """
    if _WORD % bits == 0:
        return _from_fields(words, bits)[..., :count]
    word, shift = _places(bits, count, words.device)
    wide = pad(words.long() & 0xFFFFFFFF, (0, 1))
    return ((wide[..., word] | (wide[..., word + 1] << _WORD)) >> shift & (2**bits - 1)).to(torch.int16)


def to_stream(codes: Tensor, bits: int) -> Tensor:
    """Inverse of `from_stream`: int32 ``(..., ceil(count * bits / 32))``, unused bits 0."""
    if _WORD % bits == 0:
        return _to_fields(codes, bits)
    word, shift = _places(bits, codes.shape[-1], codes.device)
    shifted = codes.long() << shift
    count = -(-codes.shape[-1] * bits // _WORD)
    wide = torch.zeros(*codes.shape[:-1], count + 1, dtype=torch.int64, device=codes.device)
    wide.index_add_(-1, word, shifted & 0xFFFFFFFF)
    wide.index_add_(-1, word + 1, shifted >> _WORD)
    return wide[..., :count].to(torch.int32)


def from_planes(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes of bit planes: 32 codes are ``bits`` words, first those of their low bits, then those of the next.

    Args:
        words: int32 ``(..., words)``.
        bits: 2 to 8.
        count: codes in a row, a multiple of 32.

    Returns:
        int16 ``(..., count)``.
    """
    blocks = words.unflatten(-1, (-1, bits))
    codes = torch.zeros(*blocks.shape[:-1], _WORD, dtype=torch.int16, device=words.device)
    low = 0
    for width in _PLANES[bits]:
        codes |= _from_fields(blocks[..., low : low + width], width) << low
        low += width
    return codes.flatten(-2)[..., :count]


def to_planes(codes: Tensor, bits: int) -> Tensor:
    """Inverse of `from_planes`."""
    blocks = codes.unflatten(-1, (-1, _WORD))
    planes, low = [], 0
    for width in _PLANES[bits]:
        planes.append(_to_fields((blocks >> low) & (2**width - 1), width))
        low += width
    return torch.cat(planes, -1).flatten(-2)


def from_interleaved(words: Tensor) -> Tensor:
    """Eight 4-bit codes a word, even ones first: int32 ``(..., words)`` to int16 ``(..., 8 * words)``."""
    back = [_INTERLEAVED.index(i) for i in range(len(_INTERLEAVED))]
    return _from_fields(words, 4).unflatten(-1, (-1, len(back)))[..., back].flatten(-2)


def to_interleaved(codes: Tensor) -> Tensor:
    """Inverse of `from_interleaved`; the number of codes in a row is a multiple of 8."""
    return _to_fields(codes.unflatten(-1, (-1, len(_INTERLEAVED)))[..., list(_INTERLEAVED)].flatten(-2), 4)


def _from_fields(words: Tensor, width: int) -> Tensor:
    """Fields that no byte boundary cuts."""
    held = words.contiguous().view(torch.uint8)  # the lowest byte first
    shifts = torch.arange(0, _BYTE, width, dtype=torch.uint8, device=words.device)
    return ((held.unsqueeze(-1) >> shifts) & (2**width - 1)).to(torch.int16).flatten(-2)


def _to_fields(codes: Tensor, width: int) -> Tensor:
    held = codes.to(torch.uint8)
    if missing := -codes.shape[-1] % (_WORD // width):
        held = pad(held, (0, missing))
    shifts = torch.arange(0, _BYTE, width, dtype=torch.uint8, device=codes.device)
    packed = (held.unflatten(-1, (-1, _BYTE // width)) << shifts).sum(-1, dtype=torch.uint8)
    return packed.view(torch.int32)


def _places(bits: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Word and bit in it at which each code begins."""
    first = torch.arange(count, device=device) * bits
    return first // _WORD, first % _WORD
