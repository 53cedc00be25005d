"""An MLServer directory: ``settings.json``, a ``model-settings.json`` for each version, and our runtime."""

from __future__ import annotations

import json
from typing import Any

from oftfx.errors import ExportError
from oftfx.serving.copied.runtime import ServedModel, Tensor
from oftfx.serving.options import Options, ServerFiles
from oftfx.typed_json import parsed

MESSAGE = 2**31 - 1  # bytes of one gRPC message; the default of 4 MiB is less than the logits of one sentence


def server_files(model: ServedModel, options: Options) -> ServerFiles:
    """Files of a model in an MLServer directory.

    Raises:
        ExportError: a backend is asked for; only Triton has them.
    """
    if options.backend is not None:
        raise ExportError(f"backend: got {options.backend!r}; MLServer has one, leave it out")
    return ServerFiles(
        shared={"settings.json": server_settings(options)},
        own={"model-settings.json": model_settings(model, options)},
        runtime={"oftfx_mlserver.py": "mlserver_model.py", "oftfx_runtime": "runtime"},
        backend="mlserver",
        command="mlserver start {out}",
    )


def check(path: str, old: str, new: str) -> None:
    """The settings that are there stay, whatever else stands in them; the addresses have to be those asked for.

    Raises:
        ExportError: others are there, or they cannot be read.
    """
    try:
        there, asked = dict(parsed(old)), parsed(new)
    except (TypeError, ValueError) as error:
        raise ExportError(f"{path}: expected a JSON object, {error}; mend or remove it") from error
    for key in ("host", "http_port", "grpc_port"):
        if there.get(key) != asked[key]:
            raise ExportError(
                f"{path}: {key} is {there.get(key)!r} there and {asked[key]!r} here; give that one, or edit the file"
            )


def server_settings(options: Options) -> str:
    """``settings.json``: one process, so that one session serves every adapter; no metrics, which take a port."""
    settings = {
        "host": options.host,
        "http_port": options.http_port,
        "grpc_port": options.grpc_port,
        "metrics_endpoint": None,
        "parallel_workers": 0,
        "grpc_max_message_length": MESSAGE,
        "debug": False,
    }
    return json.dumps(settings, indent=2) + "\n"


def model_settings(model: ServedModel, options: Options) -> str:
    """``model-settings.json``; MLServer's own adaptive batching is off, see ``mlserver_model.py``."""
    extra: dict[str, Any] = {
        "max_batch_size": options.max_batch_size,
        "max_queue_delay": options.max_queue_delay,
        "instances": options.instances,
    }
    if options.threads is not None:
        extra["threads"] = options.threads
    settings = {
        "name": options.name,
        "implementation": "oftfx_mlserver.OftfxModel",
        "max_batch_size": 0,
        "max_batch_time": 0.0,
        "inputs": [_tensor(t) for t in model.inputs],
        "outputs": [_tensor(t) for t in model.outputs],
        "parameters": {"uri": "./model.onnx", "version": str(options.version), "extra": extra},
    }
    return json.dumps(settings, indent=2) + "\n"


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
