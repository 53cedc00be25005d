"""A look at a few numbers of a tensor, for what no version counter shows: writes through ``.data``."""

from __future__ import annotations

from ctypes import c_char
from typing import Any

import torch
from torch import Tensor

_LOOKS = 16


class Glimpse:
    """Bytes from places all over the memory of the tensors that stand at one place; well under a microsecond.

    What writes all of a tensor (averaged weights put in its place, scaling) shows in them; a write of a part may not.
    """

    _place = 0, 0
    _view: memoryview | None = None

    def of(self, tensor: Tensor) -> bytes:
        """The bytes now.

        None for tensors on an accelerator, which would have to be waited for, and for those without memory of their
        own or with gaps in it.
        """
        return self.at(tensor)[1]

    def at(self, tensor: Tensor) -> tuple[int, bytes]:
        """The same, and the address."""
        place = tensor.data_ptr(), tensor.untyped_storage().nbytes()
        if place != self._place:
            self._view, self._place = _looks(tensor, place[0]), place
        view = self._view  # read once: another thread may look at another tensor
        return place[0], b"" if view is None else view.tobytes()

    def forget(self) -> None:
        """The tensor may go."""
        self._place, self._view = (0, 0), None

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _looks(tensor: Tensor, address: int) -> memoryview | None:
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and address
    if not plain or not _is_dense(tensor):
        return None
    size = tensor.numel() * tensor.element_size()
    if tensor.storage_offset() * tensor.element_size() + size > tensor.untyped_storage().nbytes():
        return None  # somebody has made its storage smaller
    return memoryview((c_char * size).from_address(address)).cast("B")[:: max(1, size // _LOOKS | 1)]


def _is_dense(tensor: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    there = tensor.is_contiguous() or tensor.is_contiguous(
        memory_format=formats.get(tensor.dim(), torch.contiguous_format)
    )
    return there and tensor.numel() > 0
