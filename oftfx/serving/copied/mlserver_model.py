"""The model that MLServer runs: `oftfx.serving.write_repository` copies this file as ``oftfx_mlserver.py``.

It needs mlserver, numpy and ONNX Runtime, and neither oftfx nor torch. MLServer's own adaptive batching stays off: it
merges the parameters of the requests that it puts together and the last one wins, so that requests would be answered by
each other's adapters. Requests are put together here instead, and grouped by adapter.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
from mlserver import MLModel
from mlserver.errors import MLServerError, ModelNotFound
from mlserver.types import (
    InferenceRequest,
    InferenceResponse,
    MetadataModelResponse,
    MetadataTensor,
    RequestInput,
    ResponseOutput,
)
from mlserver.utils import get_model_uri

_KINDS = {"BOOL": "b", "INT": "iu", "UINT": "iu", "FP": "iufO"}  # null is NaN in JSON; it arrives in an object array


def _runtime(folder: Path) -> Any:
    """The package beside the model, as it is now; versions of a model may come from different versions of oftfx."""
    package = folder / "oftfx_runtime"
    digest = hashlib.sha256(str(package).encode())
    for path in sorted(package.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    name = f"oftfx_runtime_{digest.hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    if spec is None or spec.loader is None:
        raise FileNotFoundError(package)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a changed file must not meet stale byte code
    try:
        spec.loader.exec_module(module)
        for public in module.__all__:  # all files as they are now, not each when it is first needed
            getattr(module, public)
    except BaseException:
        for loaded in [n for n in sys.modules if n == name or n.startswith(f"{name}.")]:
            del sys.modules[loaded]
        raise
    finally:
        sys.dont_write_bytecode = written
    return module


class OftfxModel(MLModel):
    """A model directory that `oftfx.serving.write_repository` wrote.

    ``parameters.extra`` of its settings: ``threads`` of one run, ``max_batch_size`` rows and ``max_queue_delay``
    seconds of waiting for more, ``instances``: runs at the same time.
    """

    async def load(self) -> bool:
        """Open the model and its adapters; what is wrong with them stops the load."""
        self._open, self._tasks = False, []  # first of all: MLServer also unloads a model whose load fails
        self._waiting: set[Any] = set()
        path = Path(await get_model_uri(self.settings)).resolve()
        folder, extra = path.parent, self.settings.parameters.extra or {}
        self._rows, self._delay = extra.get("max_batch_size", 1), extra.get("max_queue_delay", 0.0)
        self._module = _runtime(folder)
        adapters = folder / "adapters"
        self._model = await asyncio.to_thread(
            self._module.ServedModel,
            path,
            adapters=adapters if adapters.is_dir() else None,
            threads=extra.get("threads"),
            share_runs=self._rows > 1,
        )
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._work()) for _ in range(extra.get("instances", 1))]
        self._open = True
        return True

    async def unload(self) -> bool:
        """Refuse new requests, answer those that wait, then stop the tasks that run the model."""
        self._open = False
        if self._waiting:
            await asyncio.wait(set(self._waiting))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        return True

    async def metadata(self) -> MetadataModelResponse:
        """Inputs and outputs as the protocol describes them."""
        version = self.settings.parameters.version
        return MetadataModelResponse(
            name=self.name,
            platform="onnxruntime",
            versions=[version] if version else [],
            inputs=[MetadataTensor(name=t.name, datatype=t.datatype, shape=list(t.shape)) for t in self._model.inputs],
            outputs=[
                MetadataTensor(name=t.name, datatype=t.datatype, shape=list(t.shape)) for t in self._model.outputs
            ],
        )

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer one request; an unknown adapter or wrong inputs are errors of status 400."""
        answer: Any = asyncio.get_running_loop().create_future()
        try:
            request = self._request(payload)
            if not self._open:
                raise ModelNotFound(self.name, self.settings.parameters.version)
            self._waiting.add(answer)
            await self._queue.put((request, answer))
            outputs = await answer
        except self._module.RequestError as error:
            raise MLServerError(str(error), 400) from error
        except self._module.ServingError as error:
            raise MLServerError(str(error), 500) from error
        finally:
            self._waiting.discard(answer)
        types = {t.name: t.datatype for t in self._model.outputs}
        return InferenceResponse(
            model_name=self.name,
            model_version=self.settings.parameters.version,
            outputs=[_output(name, types[name], array) for name, array in outputs.items()],
        )

    async def _work(self) -> None:
        """Take what waits, run it in a thread, hand out the answers, again and again."""
        held = None
        while True:
            taken, held = await self._take(held or await self._queue.get())
            taken = [one for one in taken if not one[1].done()]  # the clients of the others are gone
            try:
                answers = await asyncio.to_thread(self._model.run_all, [request for request, _ in taken])
            except Exception as error:
                answers = [error] * len(taken)
            for (_, future), answer in zip(taken, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    async def _take(self, first: Any) -> tuple[list[Any], Any]:
        """With the first, those that come within the delay, as long as their rows fit; and one that did not fit."""
        taken, rows = [first], _rows(first)
        end = asyncio.get_running_loop().time() + self._delay
        while self._model.batched and rows < self._rows:
            try:
                item = self._queue.get_nowait()
            except asyncio.QueueEmpty:
                left = end - asyncio.get_running_loop().time()
                try:
                    item = await asyncio.wait_for(self._queue.get(), max(left, 0))
                except TimeoutError:
                    break
            rows += _rows(item)
            if rows > self._rows:
                return taken, item
            taken.append(item)
        return taken, None

    def _request(self, payload: InferenceRequest) -> Any:
        for tensor in payload.inputs:
            named = tensor.parameters.model_dump(exclude_none=True) if tensor.parameters else {}
            if key := next((k for k in named if "adapter" in k.lower()), None):
                raise self._module.RequestError(
                    f"parameter {key!r} stands in the input {tensor.name!r}; "
                    "it belongs to the request: a request has one adapter"
                )
        parameters = payload.parameters.model_dump(exclude={"content_type", "headers"}) if payload.parameters else {}
        types = {t.name: t for t in self._model.inputs}
        inputs = {t.name: self._array(t, types.get(t.name)) for t in payload.inputs}
        return self._module.Request(inputs, parameters, [o.name for o in payload.outputs or []] or None)

    def _array(self, tensor: RequestInput, wanted: Any) -> np.ndarray:
        """The values as an array of the type that the request states; no value is rounded to fit it."""
        datatype = str(getattr(tensor.datatype, "value", tensor.datatype))
        if wanted is not None and datatype != wanted.datatype:
            raise self._module.RequestError(f"input {tensor.name!r} is {datatype}, expected {wanted.datatype}")
        data = getattr(tensor.data, "root", tensor.data)
        try:
            if datatype == "BYTES":
                array = np.empty(len(data), dtype=np.object_)
                array[:] = data
                return array.reshape(tensor.shape)
            found = np.array(data)
            kinds = next(kinds for word, kinds in _KINDS.items() if datatype.startswith(word))
            if found.size and found.dtype.kind not in kinds:
                raise ValueError(f"the values are {found.dtype}")
            with np.errstate(over="raise"):
                array = np.array(data, dtype=wanted.dtype if wanted else None)
            return array.reshape(tensor.shape)
        except (ValueError, OverflowError, FloatingPointError, TypeError) as error:
            raise self._module.RequestError(
                f"input {tensor.name!r} cannot be read as {datatype} {tensor.shape}: {error}"
            ) from error


def _rows(item: Any) -> int:
    array = next(iter(item[0].inputs.values()), None)
    return len(array) if array is not None and array.ndim else 1


def _output(name: str, datatype: str, array: np.ndarray) -> ResponseOutput:
    return ResponseOutput(name=name, datatype=datatype, shape=list(array.shape), data=array.reshape(-1).tolist())
