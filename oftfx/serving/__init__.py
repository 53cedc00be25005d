"""Model repositories for inference servers, Triton and MLServer, with the adapter chosen for each request."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from oftfx.errors import MissingExtraError

_HOME = {
    "Repository": "oftfx.serving.repository",
    "write_repository": "oftfx.serving.repository",
    "Request": "oftfx.serving.copied.runtime",
    "RequestError": "oftfx.serving.copied.runtime",
    "ServedModel": "oftfx.serving.copied.runtime",
    "ServingError": "oftfx.serving.copied.runtime",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from oftfx.serving.copied.runtime import Request, RequestError, ServedModel, ServingError
    from oftfx.serving.repository import Repository, write_repository


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'oftfx.serving' has no attribute {name!r}")
    if find_spec("onnxruntime") is None and _HOME[name] == "oftfx.serving.copied.runtime":
        raise MissingExtraError("onnxruntime", "onnx", "Serving a model")
    return getattr(import_module(_HOME[name]), name)
