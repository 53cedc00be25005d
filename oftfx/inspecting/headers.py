"""Headers of safetensors files: names, dtypes and shapes, held against the size of the file before any are believed."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oftfx.inspecting.found import InspectError
from oftfx.streaming.directory import BITS
from oftfx.typed_json import parsed

_LARGEST = 100 * 2**20  # as the format itself allows


@dataclass(frozen=True)
class Header:
    """Of one file.

    Attributes:
        notes: its metadata.
        tensors: name to ``(dtype, shape, bytes)``.
    """

    notes: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...], int]]

    @property
    def numbers(self) -> int:
        """How many there are in all."""
        return sum(math.prod(shape) for _, shape, _ in self.tensors.values())


def read_header(path: Path) -> Header:
    """The header of a file.

    Raises:
        InspectError: it is none, or says something that the file cannot hold.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST):
                raise ValueError(f"its header would be {length:,} bytes in a file of {size:,}")
            found: Any = parsed(stream.read(length))
        notes = {str(k): str(v) for k, v in found.pop("__metadata__", {}).items()}
        tensors = {}
        for name, entry in found.items():
            shape = tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
            bits = BITS.get(entry["dtype"])
            wrong = bits is not None and (math.prod(shape) * bits + 7) // 8 != end - begin
            if min((*shape, 0)) < 0 or not 0 <= begin <= end <= size - 8 - length or wrong:
                raise ValueError(f"{name} {entry['dtype']} {list(shape)} does not fit its place in the file")
            tensors[str(name)] = (str(entry["dtype"]), shape, end - begin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InspectError(f"{path} is damaged or not a safetensors file: {error}") from None
    return Header(notes, tensors)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
