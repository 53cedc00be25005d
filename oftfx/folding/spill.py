"""Keep what waiting forwards hold in files: their hidden states take disk instead of memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oftfx.errors import FoldError

_MADVISE: Any = ctypes.CDLL(None).madvise if sys.platform == "linux" else None
_SMALL = 1 << 16
"""Bytes of a tensor that is not worth a file."""


class Spill:
    """Where the files are. Each has no name and goes with the last tensor in it, also when the process is killed.

    A tensor that is put away stays a tensor: it only stands in memory that is mapped from a file. Whoever reads it, in
    whatever thread, reads right numbers, from the disk where they are not in the system's cache.

    Args:
        directory: of the files; the disk should have room for the hidden states of all inputs.
    """

    possible: ClassVar[bool] = hasattr(os, "posix_fallocate")
    """Whether the system can have such files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._filed: weakref.WeakSet[Any] = weakref.WeakSet()

    def watch(self) -> Watch:
        """For one forward; to be entered in its thread."""
        return Watch(self)

    def storage(self, nbytes: int) -> torch.UntypedStorage:
        """Memory mapped from a new file.

        Raises:
            FoldError: the disk is full.
        """
        handle, name = tempfile.mkstemp(prefix="hidden-", dir=self.directory)
        try:
            # Where the disk is full, this says so; a write through the map would end the process.
            os.posix_fallocate(handle, 0, nbytes)
            made = torch.UntypedStorage.from_file(name, True, nbytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise FoldError(
                f"{self.directory}: the disk is full, there is no room for hidden states ({nbytes:,} bytes more). Make "
                "room, calibrate on less, or keep them in memory; what was calibrated stays"
            ) from error
        finally:
            os.close(handle)
            os.unlink(name)
        self._filed.add(made)
        return made

    def forget(self) -> None:
        """Give the memory of all files back; who reads one has it read again, from the system's cache or the disk."""
        for storage in self._filed if _MADVISE is not None else ():
            _MADVISE(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), mmap.MADV_DONTNEED)


class Watch(TorchDispatchMode):
    """Knows the tensors that a forward has made and that somebody still has."""

    def __init__(self, spill: Spill) -> None:
        super().__init__()
        self._spill = spill
        self._made: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._count, self._busy = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and note what is new."""
        result = func(*args, **(kwargs or {}))
        if not self._busy:
            mine = {_place(t) for t in self._made.values()}
            others = {_place(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)} - mine
            for tensor in tree_leaves(result):
                if _is_plain(tensor) and _place(tensor) not in others and tensor.untyped_storage().nbytes() >= _SMALL:
                    self._count += 1
                    self._made[self._count] = tensor
        return result

    def put_away(self) -> None:
        """Let everything that is there stand in files, and give the memory back.

        Raises:
            FoldError: the disk is full.
        """
        self._busy = True
        try:
            together: dict[int | None, list[Tensor]] = {}
            for tensor in self._made.values():
                together.setdefault(_place(tensor), []).append(tensor)
            for tensors in list(together.values()):
                self._file(tensors)
            self._made.clear()
        finally:
            self._busy = False
        self._spill.forget()

    def _file(self, tensors: list[Tensor]) -> None:
        old = tensors[0].untyped_storage()
        new = self._spill.storage(old.nbytes())
        new.copy_(old)
        for tensor in tensors:  # views of one storage stay so
            tensor.set_(new, tensor.storage_offset(), tensor.size(), tensor.stride())


def _place(tensor: Tensor) -> int | None:
    """What tells a storage from another; of a subclass that has none, or several, None."""
    return tensor.untyped_storage().data_ptr() if torch._C._has_storage(tensor) else None


def _is_plain(value: Any) -> bool:
    return type(value) is Tensor and value.layout == torch.strided and value.device.type == "cpu"
