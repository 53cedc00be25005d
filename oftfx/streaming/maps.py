"""Tensors of a checkpoint through memory maps: nothing is read before it is used, and what was used is given back."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

import torch
from torch import Tensor

from oftfx.errors import FoldError
from oftfx.streaming.directory import Stored

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""How safetensors writes a dtype."""


def dtype_of(stored: Stored) -> torch.dtype:
    """Its dtype in torch.

    Raises:
        FoldError: torch has none.
    """
    if stored.dtype not in _DTYPES:
        raise FoldError(f"{stored.name} in {stored.file} has dtype {stored.dtype}, which torch cannot compute with")
    return _DTYPES[stored.dtype]


class Maps:
    """The files of a directory, mapped when they are first used.

    Pages are private: a loader that writes into a tensor (GPTQ's zeros, say) changes its own copy of the page.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._maps: dict[str, mmap.mmap] = {}
        self._lock = threading.Lock()

    def tensor(self, stored: Stored) -> Tensor:
        """A tensor over the file's own bytes.

        Raises:
            FoldError: its dtype is none of torch's.
        """
        dtype = dtype_of(stored)
        if not stored.nbytes:
            return torch.empty(stored.shape, dtype=dtype)
        size = torch.empty(0, dtype=dtype).element_size()
        mapped, count = self._map(stored.file), stored.nbytes // size
        if stored.begin % size:  # the header was not padded
            return torch.frombuffer(bytearray(mapped[stored.begin : stored.end]), dtype=dtype).view(stored.shape)
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=stored.begin).view(stored.shape)

    def bytes(self, file: str, begin: int, end: int) -> memoryview:
        """Bytes of a file."""
        return memoryview(self._map(file))[begin:end]

    def forget(self, file: str, begin: int, end: int) -> None:
        """Give the pages between two places back; what was written into them is lost, what was read is read again."""
        page = mmap.PAGESIZE
        first, last = -(-begin // page) * page, end // page * page
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._map(file).madvise(mmap.MADV_DONTNEED, first, last - first)

    def _map(self, file: str) -> mmap.mmap:
        with self._lock:
            if file in self._maps:
                return self._maps[file]
            with (self.directory / file).open("rb") as stream:
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
                if hasattr(mmap, "MADV_SEQUENTIAL"):
                    self._maps[file].madvise(mmap.MADV_SEQUENTIAL)
        return self._maps[file]
