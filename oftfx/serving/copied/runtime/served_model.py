"""A session that answers requests, several in one run where their adapters and shapes allow it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from .adapters import AdapterFolder
from .contract import ADAPTER_INDEX, ADAPTER_NAMES, INTERFACE, MODE, MODES, SUFFIX
from .errors import RequestError, ServingError, unknown_adapter
from .protocol import Request, Tensor


@dataclass(frozen=True)
class _Ready:
    """A request that was checked. Those with equal `key` can share a run."""

    feeds: dict[str, np.ndarray]
    outputs: tuple[str, ...]
    adapter: Any  # a LoraAdapter, a row of the stack, or None
    key: tuple[Any, ...]


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

    Examples:
        >>> import numpy, oftfx, torch
        >>> from oftfx.serving import Request, ServedModel
        >>> model = oftfx.transform(torch.nn.Sequential(torch.nn.Linear(6, 4)), {"*": oftfx.OFT(3, init="normal")})
        >>> report = oftfx.export_onnx(model, "model.onnx", (torch.randn(5, 6),), adapters="mixed")
        >>> served, x = ServedModel("model.onnx"), {"input": numpy.ones((2, 6), numpy.float32)}
        >>> served.batched, served.adapter_names()
        (True, ['default'])
        >>> base, rotated = served.run_all([Request(x), Request(x, {"adapter": "default"})])
        >>> base["output_0"].shape, numpy.allclose(base["output_0"], rotated["output_0"])
        ((2, 4), False)
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
        try:
            metadata = self._session.get_modelmeta().custom_metadata_map
            inputs = [Tensor.of(i, self.path) for i in self._session.get_inputs()]
            outputs = [Tensor.of(o, self.path) for o in self._session.get_outputs()]
        except UnicodeDecodeError as error:
            raise ServingError(f"{path} is damaged: a name in it is no text: {error}") from error
        self.mode: str = metadata.get(MODE, "fixed")
        if self.mode not in MODES:
            raise ServingError(
                f"{path}: {MODE} is {self.mode!r}, expected one of {', '.join(MODES)}; it was written by a newer oftfx"
            )
        self.inputs = tuple(i for i in inputs if self.mode != "mixed" or i.name != ADAPTER_INDEX)
        self.outputs = tuple(outputs)
        self.batched = share_runs and _rows_stay_apart([t.axes for t in (*inputs, *self.outputs)])
        self._stack = self._names(metadata) if self.mode == "mixed" else []
        self._folder = self._adapter_folder(adapters, metadata)

    def _names(self, metadata: Mapping[str, str]) -> list[str]:
        try:
            found = json.loads(metadata[ADAPTER_NAMES])
        except (KeyError, ValueError, RecursionError) as error:
            raise ServingError(f"{self.path} is damaged: its {ADAPTER_NAMES} cannot be read: {error}") from error
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise ServingError(f"{self.path} is damaged: its {ADAPTER_NAMES} is {metadata[ADAPTER_NAMES][:200]}")
        return found

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
        found = AdapterFolder(Path(folder), metadata.get(INTERFACE, ""), blocks)
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
        _check(request)
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
                raise unknown_adapter(name, self.adapter_names())
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
            feeds = {**feeds, ADAPTER_INDEX: np.repeat(np.array(rows, dtype=np.int64), lengths)}
        elif group[0].adapter is not None:
            # The options keep no reference; `group` keeps the adapter alive during the run.
            options.add_active_adapter(group[0].adapter)
        return dict(zip(outputs, self._session.run(list(outputs), feeds, options), strict=True))


def _check(request: Request) -> None:
    """Whether a request has the types that the protocol gives it; a server's front end passes on what was sent."""
    for what in ("inputs", "parameters"):
        found = getattr(request, what)
        if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
            raise RequestError(f"{what}: got a {type(found).__name__}, expected values by name")
    outputs = request.outputs
    if outputs is not None and (
        isinstance(outputs, str)
        or not isinstance(outputs, Sequence)
        or not all(isinstance(name, str) for name in outputs)
    ):
        raise RequestError(f"outputs: got a {type(outputs).__name__}, expected names")


def _rows_stay_apart(axes: Sequence[tuple[str, ...]]) -> bool:
    """Whether all have the same named first axis, and that name stands nowhere else, nor in a sum like ``n + 1``."""
    first = {names[:1] for names in axes}
    batch = "".join(first.pop()) if len(first) == 1 else ""
    others = {other for names in axes for other in names[1:]}
    return batch != "" and all(batch not in (other, *re.findall(r"\w+", other)) for other in others)
