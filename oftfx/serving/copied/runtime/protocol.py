"""Tensors and requests as the Open Inference Protocol has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import RequestError, ServingError

_TYPES: dict[str, tuple[str, Any]] = {
    "tensor(bool)": ("BOOL", np.bool_),
    "tensor(string)": ("BYTES", np.object_),
    "tensor(float16)": ("FP16", np.float16),
    "tensor(float)": ("FP32", np.float32),
    "tensor(double)": ("FP64", np.float64),
    **{f"tensor(int{n})": (f"INT{n}", np.dtype(f"int{n}").type) for n in (8, 16, 32, 64)},
    **{f"tensor(uint{n})": (f"UINT{n}", np.dtype(f"uint{n}").type) for n in (8, 16, 32, 64)},
}


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
        try:
            array = np.asarray(value)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise RequestError(f"input {self.name!r} is no array: {error}") from error
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

    Examples:
        >>> import numpy, oftfx, torch
        >>> from oftfx.serving import Request, ServedModel
        >>> report = oftfx.export_onnx(torch.nn.Linear(6, 4), "model.onnx", (torch.randn(5, 6),))
        >>> request = Request({"input": numpy.ones((2, 6), numpy.float32)})
        >>> {name: array.shape for name, array in ServedModel("model.onnx").run(request).items()}
        {'output_0': (2, 4)}
    """

    inputs: Mapping[str, Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: Sequence[str] | None = None
