"""The model that Triton's Python backend runs: `oftfx.serving.write_repository` copies this file as ``model.py``.

It needs numpy and ONNX Runtime in the Python of the backend, and neither oftfx nor torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from oftfx_runtime import Request, RequestError, ServedModel


class TritonPythonModel:
    """Triton makes one object of this class for each instance, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model beside this file and its adapters; what is wrong with them stops the load."""
        config = json.loads(args["model_config"])
        parameters = config.get("parameters", {})
        threads = int(parameters["threads"]["string_value"]) if "threads" in parameters else None
        folder = Path(__file__).parent
        adapters = folder / "adapters"
        self._model = ServedModel(
            folder / "model.onnx",
            adapters=adapters if adapters.is_dir() else None,
            threads=threads,
            share_runs=config["max_batch_size"] > 1,
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the requests that Triton's dynamic batcher put together, whatever adapters they name."""
        readable, answers = {}, {}
        for index, request in enumerate(requests):
            try:
                readable[index] = Request(
                    {t.name(): t.as_numpy() for t in request.inputs()},
                    json.loads(request.parameters() or "{}"),
                    sorted(request.requested_output_names()),
                )
            except Exception as error:
                answers[index] = error
        answers.update(zip(readable, self._model.run_all(list(readable.values())), strict=True))
        return [_response(answers[index]) for index in range(len(requests))]


def _response(answer: Any) -> Any:
    if isinstance(answer, Exception):
        wrong = isinstance(answer, RequestError)
        code = pb_utils.TritonError.INVALID_ARG if wrong else pb_utils.TritonError.INTERNAL
        return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(answer), code))
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, _plain(array)) for name, array in answer.items()])


def _plain(array: np.ndarray) -> np.ndarray:
    """Contiguous, and text as bytes."""
    if array.dtype == np.object_:
        encoded = [str(text).encode() for text in array.reshape(-1)]
        return np.array(encoded, dtype=np.object_).reshape(array.shape)
    return np.ascontiguousarray(array)
