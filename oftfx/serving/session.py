"""An exported model in ONNX Runtime, with the adapter chosen for each request: what every server of ours runs.

It needs numpy and ONNX Runtime, and neither oftfx nor torch: `oftfx.serving.write_repository` copies this file, as it
is, beside the model, so that a server's environment stays small and a repository goes on working when oftfx changes.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

_Base: Any
try:  # where oftfx is at hand its own base class; a server has no oftfx
    from oftfx.errors import OftfxError as _Base
except ImportError:
    _Base = Exception

SUFFIX = ".onnx_adapter"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""What an adapter may be called. A request names it and a file has that name, so it can hold no path."""

_TYPES: dict[str, tuple[str, Any]] = {
    "tensor(bool)": ("BOOL", np.bool_),
    "tensor(string)": ("BYTES", np.object_),
    "tensor(float16)": ("FP16", np.float16),
    "tensor(float)": ("FP32", np.float32),
    "tensor(double)": ("FP64", np.float64),
    **{f"tensor(int{n})": (f"INT{n}", np.dtype(f"int{n}").type) for n in (8, 16, 32, 64)},
    **{f"tensor(uint{n})": (f"UINT{n}", np.dtype(f"uint{n}").type) for n in (8, 16, 32, 64)},
}


class ServingError(_Base):
    """A model or an adapter file cannot be served."""


class RequestError(ServingError, ValueError):
    """A request is wrong: the sender has to change it. Servers answer with status 400, INVALID_ARGUMENT."""


@dataclass(frozen=True)
class Tensor:
    """An input or output as the Open Inference Protocol describes it.

    Args:
        name: of the graph's input or output.
        datatype: the protocol's word: ``FP32``, ``INT64``, ``BYTES`` (text), ...
        shape: one length an axis, -1 where it is free.
        axes: the name of each free axis, ``""`` where it has none.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @property
    def dtype(self) -> Any:
        """The numpy type; text is ``object``."""
        return next(dtype for word, dtype in _TYPES.values() if word == self.datatype)

    @classmethod
    def of(cls, found: Any, path: Path) -> Tensor:
        if found.type not in _TYPES:
            raise ServingError(
                f"{path}: {found.name!r} is {found.type}, which the protocol cannot carry; expected "
                f"{', '.join(sorted(_TYPES))}; cast it inside the model"
            )
        free = [not isinstance(length, int) for length in found.shape]
        shape = tuple(-1 if is_free else int(n) for n, is_free in zip(found.shape, free, strict=True))
        axes = tuple(str(n or "") if is_free else "" for n, is_free in zip(found.shape, free, strict=True))
        return cls(found.name, _TYPES[found.type][0], shape, axes)

    def checked(self, value: Any) -> np.ndarray:
        """The array, in this tensor's type; nothing is rounded or cut.

        Raises:
            RequestError: another type or shape.
        """
        array = np.asarray(value)
        if self.datatype == "BYTES":
            if array.dtype.kind not in "OSU":
                raise RequestError(f"input {self.name!r} is {array.dtype}, expected text (BYTES)")
            try:
                flat = [t.decode() if isinstance(t, bytes) else str(t) for t in array.reshape(-1).tolist()]
            except UnicodeDecodeError as error:
                raise RequestError(f"input {self.name!r} holds bytes that are not UTF-8: {error}") from error
            array = np.array(flat, dtype=np.object_).reshape(array.shape)
        elif array.dtype != self.dtype:
            raise RequestError(f"input {self.name!r} is {array.dtype}, expected {np.dtype(self.dtype)}")
        fits = array.ndim == len(self.shape) and all(
            want in (-1, got) for want, got in zip(self.shape, array.shape, strict=True)
        )
        if not fits:
            raise RequestError(f"input {self.name!r} has shape {list(array.shape)}, expected {list(self.shape)}")
        return array


@dataclass(frozen=True)
class Request:
    """One request.

    Args:
        inputs: arrays by name; text as an object array of str or bytes.
        parameters: the protocol's; ``adapter`` chooses the adapter by name, absent or ``""`` is the base model.
        outputs: the names of those to return; None: all.
    """

    inputs: Mapping[str, Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: Sequence[str] | None = None


@dataclass(frozen=True)
class _Ready:
    """A request that was checked. Those with equal `key` can share a run."""

    feeds: dict[str, np.ndarray]
    outputs: tuple[str, ...]
    adapter: Any  # a LoraAdapter, a row of the stack, or None
    key: tuple[Any, ...]


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
            raise _unknown(name, self.names()) from None
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
            f"the model's oftfx.interface is {interface}; {remedy}"
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


class ServedModel:
    """A model file and its adapters, ready to answer requests from several threads.

    Where the first axis of every input and output is the same free axis and no other axis has its name, requests are
    run together (`batched`): a swappable model by adapter, for ONNX Runtime turns the adapter of a whole run; a mixed
    model all at once. An output (batch, batch) sets every row beside every other, so such a model answers one by one.
    A graph whose rows act on each other without such an axis does not show it: turn `share_runs` off. The session runs
    on the CPU.

    Args:
        path: the ``.onnx`` file.
        adapters: the directory of its ``.onnx_adapter`` files; for a swappable model.
        threads: of one run inside ONNX Runtime; None leaves it to ONNX Runtime, which takes every core.
        share_runs: run requests together where the axes allow it.

    Raises:
        ServingError: the model cannot be served, or one of the adapters does not belong to it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        adapters: str | Path | None = None,
        threads: int | None = None,
        share_runs: bool = True,
    ) -> None:
        self.path = Path(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ServingError(f"{path} cannot be opened by ONNX Runtime: {error}") from error
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.mode: str = metadata.get("oftfx.adapter_mode", "fixed")
        if self.mode not in ("fixed", "swappable", "inputs", "mixed"):
            raise ServingError(
                f"{path}: oftfx.adapter_mode is {self.mode!r}, expected 'fixed', 'swappable', 'inputs' or 'mixed'; "
                "it was written by a newer oftfx"
            )
        inputs = [Tensor.of(i, self.path) for i in self._session.get_inputs()]
        self.inputs = tuple(i for i in inputs if self.mode != "mixed" or i.name != "adapter_index")
        self.outputs = tuple(Tensor.of(o, self.path) for o in self._session.get_outputs())
        self.batched = share_runs and _rows_stay_apart([t.axes for t in (*inputs, *self.outputs)])
        self._stack = json.loads(metadata["oftfx.adapter_names"]) if self.mode == "mixed" else []
        self._folder = self._adapter_folder(adapters, metadata)

    def _adapter_folder(self, folder: str | Path | None, metadata: Mapping[str, str]) -> AdapterFolder | None:
        if self.mode != "swappable":
            if folder is not None and any(Path(folder).glob(f"*{SUFFIX}")):
                raise ServingError(
                    f"{folder} holds adapters, and {self.path} is {self.mode!r}: it takes none; "
                    "export it with adapters='swappable'"
                )
            return None
        if folder is None:
            return None
        blocks = {i.name: i for i in self._session.get_overridable_initializers()}
        found = AdapterFolder(Path(folder), metadata.get("oftfx.interface", ""), blocks)
        found.load_all()
        return found

    def adapter_names(self) -> list[str]:
        """What a request may name now, sorted; the base model, ``""``, is not listed."""
        if self.mode == "mixed":
            return sorted(name for name in self._stack if name)
        return self._folder.names() if self._folder is not None else []

    def run(self, request: Request) -> dict[str, np.ndarray]:
        """Answer one request.

        Returns:
            The outputs by name; text as an object array of str.

        Raises:
            RequestError: the request is wrong; it names an adapter that is not there, for example.
        """
        (answer,) = self.run_all([request])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def run_all(self, requests: Sequence[Request]) -> list[dict[str, np.ndarray] | Exception]:
        """Answer requests, as many as possible in one run; one that fails does not fail another.

        Returns:
            For each request its outputs by name, or the error.
        """
        answers: list[Any] = [None] * len(requests)
        ready: dict[int, _Ready] = {}
        for index, request in enumerate(requests):
            try:
                ready[index] = self._ready(request)
            except Exception as error:
                answers[index] = error
        groups: dict[Any, list[int]] = {}
        for index, one in ready.items():
            groups.setdefault(one.key if self.batched else index, []).append(index)
        for group in groups.values():
            for index, answer in zip(group, self._run_group([ready[i] for i in group]), strict=True):
                answers[index] = answer
        return answers

    def _ready(self, request: Request) -> _Ready:
        adapter = self._adapter(request.parameters)
        known = {t.name: t for t in self.inputs}
        if set(request.inputs) != set(known):
            raise RequestError(f"inputs: got {sorted(request.inputs)}, expected {sorted(known)}")
        feeds = {name: known[name].checked(value) for name, value in request.inputs.items()}
        all_outputs = tuple(o.name for o in self.outputs)
        outputs = tuple(request.outputs) if request.outputs else all_outputs
        if missing := [o for o in outputs if o not in all_outputs]:
            raise RequestError(f"output {missing[0]!r} is not there; the model has {', '.join(all_outputs)}")
        self._check_axes(feeds)
        shapes = tuple(sorted((name, array.shape[1:]) for name, array in feeds.items()))
        # Rows of a mixed model choose for themselves; a LoraAdapter acts on the whole run.
        key = (shapes, outputs) if self.mode == "mixed" else (shapes, outputs, id(adapter))
        return _Ready(feeds, outputs, adapter, key)

    def _check_axes(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Axes of one name have one length. ONNX Runtime does not compare them, and would broadcast a length of 1."""
        bound: dict[str, tuple[int, str]] = {}
        for tensor in self.inputs:
            for axis, length in zip(tensor.axes, feeds[tensor.name].shape, strict=True):
                there, first = bound.setdefault(axis, (length, tensor.name)) if axis else (length, "")
                if there != length:
                    raise RequestError(
                        f"the inputs differ in length: axis {axis!r} is {there} in {first!r} and {length} in "
                        f"{tensor.name!r}, expected the same"
                    )

    def _adapter(self, parameters: Mapping[str, Any]) -> Any:
        for key in parameters:
            if key != "adapter" and "adapter" in key.lower():
                raise RequestError(f"parameter {key!r} means nothing here; the parameter 'adapter' names one adapter")
        name = parameters.get("adapter", "")
        if not isinstance(name, str):
            raise RequestError(f"parameter 'adapter' is {name!r}, expected one name as text: a request has one adapter")
        if self.mode == "mixed":
            if name and name not in self._stack:
                raise _unknown(name, self.adapter_names())
            return self._stack.index(name) if name else 0
        if not name:
            return None
        if self._folder is None:
            why = {"swappable": "was started without adapters", "inputs": "takes its adapter as inputs"}
            raise RequestError(
                f"unknown adapter {name!r}: this model {why.get(self.mode, 'has no adapters to choose from')}"
            )
        return self._folder.get(name)

    def _run_group(self, group: Sequence[_Ready]) -> list[Any]:
        try:
            if len(group) == 1:
                return [self._run(group[0].feeds, group[0].outputs, group, [])]
            lengths = [len(next(iter(one.feeds.values()))) for one in group]
            feeds = {name: np.concatenate([one.feeds[name] for one in group]) for name in group[0].feeds}
            together = self._run(feeds, group[0].outputs, group, lengths)
            cuts = np.cumsum(lengths)[:-1]
            parts = {name: np.split(array, cuts) for name, array in together.items()}
            return [{name: part[i] for name, part in parts.items()} for i in range(len(group))]
        except Exception as error:
            if len(group) > 1:  # one of them may be wrong, and the others must not pay for it
                return [answer for one in group for answer in self._run_group([one])]
            if type(error).__name__ == "InvalidArgument":  # a token outside the vocabulary, for example
                error = RequestError(f"ONNX Runtime refuses the inputs: {error}")
            return [error]

    def _run(
        self, feeds: dict[str, np.ndarray], outputs: Sequence[str], group: Sequence[_Ready], lengths: Sequence[int]
    ) -> dict[str, np.ndarray]:
        options = onnxruntime.RunOptions()
        options.log_severity_level = 4  # the error is raised; it need not also be printed
        if self.mode == "mixed":
            rows = [one.adapter for one in group]
            lengths = lengths or [len(next(iter(feeds.values())))]
            feeds = {**feeds, "adapter_index": np.repeat(np.array(rows, dtype=np.int64), lengths)}
        elif group[0].adapter is not None:
            # The options keep no reference; `group` keeps the adapter alive during the run.
            options.add_active_adapter(group[0].adapter)
        return dict(zip(outputs, self._session.run(list(outputs), feeds, options), strict=True))


def _rows_stay_apart(axes: Sequence[tuple[str, ...]]) -> bool:
    """Whether all have the same named first axis, and that name stands nowhere else, nor in a sum like ``n + 1``."""
    first = {names[:1] for names in axes}
    batch = "".join(first.pop()) if len(first) == 1 else ""
    others = {other for names in axes for other in names[1:]}
    return batch != "" and all(batch not in (other, *re.findall(r"\w+", other)) for other in others)


def _unknown(name: str, names: Sequence[str]) -> RequestError:
    there = ", ".join(names) if names else "none"
    return RequestError(f"unknown adapter {name!r}; there are: {there}; without the parameter the base model answers")
