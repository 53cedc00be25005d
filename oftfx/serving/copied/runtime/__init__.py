"""An exported model in ONNX Runtime, with the adapter chosen for each request: what every server of ours runs.

It needs numpy and ONNX Runtime, and neither oftfx nor torch: `oftfx.serving.write_repository` copies this package, as
it is, beside the model as ``oftfx_runtime``, so that a server's environment stays small and a repository goes on
working when oftfx changes. So its modules import each other relatively, and do without the rest of oftfx.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import NAME, AdapterFolder
    from .contract import SUFFIX
    from .errors import RequestError, ServingError
    from .protocol import Request, Tensor
    from .served_model import ServedModel

__all__ = ["NAME", "SUFFIX", "AdapterFolder", "Request", "RequestError", "ServedModel", "ServingError", "Tensor"]

_HOME = {
    **dict.fromkeys(("NAME", "AdapterFolder"), ".adapters"),
    "SUFFIX": ".contract",
    **dict.fromkeys(("RequestError", "ServingError"), ".errors"),
    **dict.fromkeys(("Request", "Tensor"), ".protocol"),
    "ServedModel": ".served_model",
}


def __getattr__(name: str) -> Any:
    """Loaded when first used: `contract` alone needs neither numpy nor ONNX Runtime."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
