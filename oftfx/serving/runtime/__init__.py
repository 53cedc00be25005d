"""An exported model in ONNX Runtime, with the adapter chosen for each request: what every server of ours runs.

It needs numpy and ONNX Runtime, and neither oftfx nor torch: `oftfx.serving.write_repository` copies this package, as
it is, beside the model as ``oftfx_runtime``, so that a server's environment stays small and a repository goes on
working when oftfx changes. So its modules import each other relatively, and do without the rest of oftfx.
"""

from .adapters import NAME, SUFFIX, AdapterFolder
from .errors import RequestError, ServingError
from .protocol import Request, Tensor
from .served_model import ServedModel

__all__ = ["NAME", "SUFFIX", "AdapterFolder", "Request", "RequestError", "ServedModel", "ServingError", "Tensor"]
