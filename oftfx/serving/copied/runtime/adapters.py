"""Adapter files in a directory: read once, checked against the model, and looked for anew at each request."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime

from .contract import INTERFACE, SUFFIX
from .errors import ServingError, unknown_adapter

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""What an adapter may be called. A request names it and a file has that name, so it can hold no path."""


class AdapterFolder:
    """The ``.onnx_adapter`` files of a directory, by name.

    The directory is the truth: a file that is added, replaced or removed while the server runs counts from the next
    request that names it. Put files there by renaming, so that none is read half-written.
    """

    def __init__(self, folder: Path, interface: str, blocks: Mapping[str, Any]) -> None:
        self.folder, self.interface, self.blocks = folder, interface, blocks
        self._loaded: dict[str, tuple[Any, Any]] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The names that a request may use now, sorted."""
        found = (path.name.removesuffix(SUFFIX) for path in self.folder.glob(f"*{SUFFIX}"))
        return sorted(name for name in found if NAME.fullmatch(name))

    def load_all(self) -> None:
        """Read every file, so that a wrong one stops the server's start and no request waits for a disk."""
        for name in self.names():
            self.get(name)

    def get(self, name: str) -> Any:
        """The ``LoraAdapter`` of a name.

        Raises:
            RequestError: there is no such adapter; the message lists those that there are.
            ServingError: its file is damaged or belongs to another model.
        """
        path = self.folder / f"{name}{SUFFIX}"
        try:
            if not NAME.fullmatch(name):
                raise FileNotFoundError
            stat = path.stat()
        except OSError:
            with self._lock:
                self._loaded.pop(name, None)
            raise unknown_adapter(name, self.names()) from None
        state = _state(stat)
        with self._lock:
            loaded = self._loaded.get(name)
            if loaded is None or loaded[0] != state:
                loaded = (state, read_adapter(path, self.interface, self.blocks))
                there = self.names()  # those whose files are gone go too, or a long-lived server would keep them all
                self._loaded = {n: one for n, one in self._loaded.items() if n in there} | {name: loaded}
            return loaded[1]


def read_adapter(path: Path, interface: str, blocks: Mapping[str, Any]) -> Any:
    """Read an ``.onnx_adapter`` file as a ``LoraAdapter``, after a check that it belongs to the model.

    ONNX Runtime itself compares neither the version in the file nor, before the first run, names and shapes. The check
    and the load each open the path; a file that is replaced in between is read again, so that what was checked is what
    answers. Messages name the file without its directory, for they are sent to clients.

    Args:
        path: the file.
        interface: the model's ``oftfx.interface``, which the file's model version must be.
        blocks: the model's overridable initializers by name.

    Raises:
        ServingError: the file is damaged, was exported for another model, or changes again and again.
    """
    for _ in range(10):
        try:
            before = _state(path.stat())
            _check_adapter(path, interface, blocks)
            adapter = onnxruntime.LoraAdapter()
            adapter.Load(str(path))
            if _state(path.stat()) == before:
                return adapter
        except ServingError:
            raise
        except Exception as error:  # the file is gone, or ONNX Runtime's own types; their texts hold directories
            raise ServingError(f"{path.name} cannot be read as an {SUFFIX} file") from error
    raise ServingError(f"{path.name} changes while it is read; put the whole file there by renaming")


def _state(stat: os.stat_result) -> tuple[int, int, int]:
    """What differs when another file stands under a name."""
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _check_adapter(path: Path, interface: str, blocks: Mapping[str, Any]) -> None:
    found = onnxruntime.AdapterFormat.read_adapter(str(path))
    parameters = found.get_parameters()
    remedy = "export it with oftfx.export_onnx_adapter from the model that this .onnx file came from"
    if str(found.get_model_version()) != interface:
        raise ServingError(
            f"{path.name} was exported for another model: its model version is {found.get_model_version()}, "
            f"the model's {INTERFACE} is {interface}; {remedy}"
        )
    for name, value in parameters.items():
        if name not in blocks:
            raise ServingError(f"{path.name} holds {name!r}, which the model has not; {remedy}")
        wanted = blocks[name]
        if list(value.shape()) != list(wanted.shape) or value.data_type() != wanted.type:
            raise ServingError(
                f"{path.name}: {name!r} is {value.data_type()} {value.shape()}, "
                f"the model's is {wanted.type} {wanted.shape}; {remedy}"
            )
