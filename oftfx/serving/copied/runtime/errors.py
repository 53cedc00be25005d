"""What is wrong: with a model or an adapter file, or with a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_Base: Any
try:  # where oftfx is at hand its own base class; a server has no oftfx
    from oftfx.errors import OftfxError as _Base
except ImportError:
    _Base = Exception


class ServingError(_Base):
    """A model or an adapter file cannot be served.

    Examples:
        >>> from oftfx.serving import ServedModel, ServingError
        >>> try:
        ...     ServedModel("missing.onnx")
        ... except ServingError as error:
        ...     print(error)
        missing.onnx cannot be opened by ONNX Runtime: ...
    """


class RequestError(ServingError, ValueError):
    """A request is wrong: the sender has to change it. Servers answer with status 400, INVALID_ARGUMENT.

    Examples:
        >>> import numpy, oftfx, torch
        >>> from oftfx.serving import Request, RequestError, ServedModel
        >>> report = oftfx.export_onnx(torch.nn.Linear(6, 4), "model.onnx", (torch.randn(5, 6),))
        >>> try:
        ...     ServedModel("model.onnx").run(Request({"input": numpy.ones((2, 5), numpy.float32)}))
        ... except RequestError as error:
        ...     print(error)
        input 'input' has shape [2, 5], expected [-1, 6]
    """


def unknown_adapter(name: str, names: Sequence[str]) -> RequestError:
    """For a request that names an adapter which is not there."""
    there = ", ".join(names) if names else "none"
    return RequestError(f"unknown adapter {name!r}; there are: {there}; without the parameter the base model answers")
