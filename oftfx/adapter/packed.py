"""Safetensors files whose bytes are decided by what is in them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

_FLOATS = {torch.float64: ("F64", 8), torch.float32: ("F32", 4)}


def packed(tensors: dict[str, Tensor], notes: Mapping[str, str]) -> bytes:
    """A file of contiguous CPU tensors; the package itself writes the metadata in an order that changes by chance."""
    from safetensors.torch import save

    data = save(tensors, metadata=dict(notes))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    return _head(header) + data[end:]


Kinds = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtypes and shapes, by the names of tensors."""


def packed_one_by_one(kinds: Kinds, make: Callable[[str], Tensor], notes: Mapping[str, str]) -> Iterator[bytes]:
    """The same file of float32 and float64 tensors in pieces, each tensor made when its turn comes."""
    order = sorted(kinds, key=lambda n: (-_FLOATS[kinds[n][0]][1], n))  # as the package has it: the widest first
    header: dict[str, object] = {"__metadata__": dict(sorted(notes.items()))}
    place = 0
    for name in order:
        (kind, size), shape = _FLOATS[kinds[name][0]], kinds[name][1]
        end = place + size * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    yield _head(header)
    for name in order:
        yield make(name).to(kinds[name][0]).contiguous().numpy().tobytes()


def _head(header: Mapping[str, object]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text
