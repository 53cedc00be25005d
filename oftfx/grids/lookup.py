"""Look-ups in small tables and searches among few limits, exact, many values at a time."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_OPEN = 14  # bits of a float32 that a cell leaves open; 12 to 16 are as fast, and tables shorter with more
_FEW = 2**13
"""Up to so many values are treated without tables."""


def looked_up(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]`` of a vector, several times as fast on a CPU."""
    return table.index_select(0, index.reshape(-1)).view(index.shape)


def decoded(table: Tensor, codes: Tensor) -> Tensor:
    """``table[codes]`` for float32 and uint8; of up to 16 entries two at a time, which is twice as fast on a CPU."""
    if not _pays(codes, table) or len(table) > 16 or codes.numel() % 2:
        return looked_up(table, codes.int())
    codes = codes.contiguous()
    if codes.storage_offset() % 2:
        return looked_up(table, codes.int())
    flat = codes.reshape(-1).view(torch.int16).to(torch.int32)
    return _pairs(_bits(table)).index_select(0, flat).view(torch.float32).view(codes.shape)


def named(values: Tensor, limits: Tensor, names: Tensor) -> Tensor:
    """``names[n]`` of each value, n being how many of the ascending ``limits`` are below it; NaN is above all.

    On a CPU, floats that agree in all but their last bits make a cell, which knows its name unless a limit goes through
    it. Only there values are searched, with those in the same eight bytes of the result. Exact, for floats of one cell
    are neighbours, and five times as fast as a search.

    Args:
        values: any shape.
        limits: float32.
        names: uint8, one more than limits.
    """
    # Bits of another dtype are other cells.
    if values.dtype != torch.float32 or not _pays(values, limits):
        return looked_up(names, torch.bucketize(values.contiguous(), limits, out_int32=True))
    flat = values.detach().reshape(-1)
    count = flat.numel()
    if count % 8:
        flat = torch.nn.functional.pad(flat, (0, -count % 8))
    cells = _cells(_bits(limits), tuple(names.tolist()))
    found = cells.index_select(0, (flat.view(torch.int32) >> _OPEN).add_(len(cells) // 2))
    words = found.view(torch.int64)
    cut = (words & _marks(found)).nonzero().view(-1)
    near = flat.view(len(words), -1).index_select(0, cut)
    exact = looked_up(names, torch.bucketize(near, limits, out_int32=True)).to(found.dtype)
    words.index_copy_(0, cut, exact.view(torch.int64).view(-1))
    return found[:count].to(torch.uint8).view(values.shape)


def _pays(many: Tensor, table: Tensor) -> bool:
    """Whether tables help; what is no plain tensor has no bits, and a compiler no numbers."""
    plain = type(many) is Tensor and type(table) is Tensor and not torch.compiler.is_compiling()
    return plain and many.device.type == "cpu" and many.numel() > _FEW and table.dtype == torch.float32


def _bits(table: Tensor) -> tuple[int, ...]:
    return tuple(table.contiguous().view(torch.int32).tolist())


def _marks(like: Tensor) -> Tensor:
    """The highest bit of each element, in words of eight bytes; int64 ``(1,)``."""
    highest = 2**7 if like.dtype == torch.uint8 else -(2**15)
    return like.new_full((8 // like.element_size(),), highest).view(torch.int64)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _cells(limits: tuple[int, ...], names: tuple[int, ...]) -> Tensor:
    """The name of each cell, in the order of their bits as signed integers; the highest bit alone where there are two.

    The two ends of a cell tell: between them nothing is larger or smaller than both. In the cell of an infinity the
    other end is NaN.
    """
    bits = torch.tensor(limits, dtype=torch.int32, device="cpu").view(torch.float32)
    dtype = torch.uint8 if max(names) < 2**7 else torch.int16
    half = 2 ** (31 - _OPEN)
    first = torch.arange(-half, half, dtype=torch.int32, device="cpu") << _OPEN
    low, high = (torch.bucketize(end.view(torch.float32), bits) for end in (first, first + (2**_OPEN - 1)))
    called = torch.tensor(names, dtype=dtype, device="cpu")[low]
    return torch.where(low == high, called, 2**7 if dtype == torch.uint8 else -(2**15))


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _pairs(bits: tuple[int, ...]) -> Tensor:
    """Two entries of a table, as one int64, for each two bytes, read as one int16, that are codes."""
    table = torch.tensor(bits, dtype=torch.int32, device="cpu")
    each = torch.arange(len(bits), device="cpu")
    both = torch.cartesian_prod(each, each)
    place = both.to(torch.uint8).view(torch.int16).view(-1).long()
    pairs = torch.zeros(2**12, dtype=torch.int64, device="cpu")
    return pairs.index_copy_(0, place, table[both].view(torch.int64).view(-1))
