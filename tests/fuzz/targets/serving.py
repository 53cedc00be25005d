"""ONNX files, adapters for them, requests to a server, and what servers answer."""

from __future__ import annotations

import io
import json
import tempfile
import urllib.error
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from oftfx.evaluation.served import InferenceServer, OpenAIServer, connect
from oftfx.inspecting.inspect import inspect
from tests.fuzz.bundle import joined, place
from tests.fuzz.targets.base import Target, every

DTYPES = (
    "float32",
    "float64",
    "int64",
    "int32",
    "bool",
    "object",
    "float16",
    "U5",
    "S5",
    "complex64",
    "datetime64[s]",
    "V4",
)


def graphs_(path: Path) -> list[bytes]:
    """A plain one, and one whose adapters are chosen."""
    from tests.serving import graphs

    made = [graphs.fixed(path / "a.onnx"), graphs.swappable(path / "b.onnx")]
    made.append(graphs.mixed(path / "c.onnx", graphs.rotations("a1", "a2")))
    return [joined({"model.onnx": file.read_bytes()}) for file in made]


def read_graph(data: bytes, path: Path) -> None:
    """As what is looked at, and as what a server is to run."""
    from oftfx.serving import write_repository

    place(data, path, ("model.onnx",))
    file = path / "model.onnx"
    every(
        lambda: str(inspect(file)).encode(),
        lambda: inspect(file).to_json(),
        lambda: write_repository(file, path / "served", server="mlserver"),
    )


def adapters(path: Path) -> list[bytes]:
    """Two files for the swappable graph."""
    from tests.serving import graphs

    for name, blocks in graphs.rotations("a1", "a2").items():
        graphs.write_adapter(path / f"{name}.onnx_adapter", blocks)
    return [joined({"a.onnx_adapter": (path / f"{name}.onnx_adapter").read_bytes()}) for name in ("a1", "a2")]


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    from tests.serving import graphs

    made = tempfile.TemporaryDirectory()
    graphs.swappable(Path(made.name) / "model.onnx")
    graphs.mixed(Path(made.name) / "mixed.onnx", graphs.rotations("a1", "a2"))
    (Path(made.name) / "adapters").mkdir()
    for name, blocks in graphs.rotations("a1", "a2").items():
        graphs.write_adapter(Path(made.name) / f"adapters/{name}.onnx_adapter", blocks)
    return made


@cache
def _served() -> tuple[Any, Any]:
    from oftfx.serving import ServedModel

    folder = Path(_folder().name)
    return ServedModel(folder / "model.onnx", adapters=folder / "adapters", threads=1), ServedModel(
        folder / "mixed.onnx", threads=1
    )


def read_adapter(data: bytes, path: Path) -> None:
    """As what is looked at, and as what a request chooses."""
    from oftfx.serving import Request
    from oftfx.serving.copied.runtime.adapters import AdapterFolder

    place(data, path, ("a.onnx_adapter",))
    model = _served()[0]
    folder, model._folder = model._folder, AdapterFolder(path, "4711", model._folder.blocks)
    try:
        every(
            lambda: str(inspect(path / "a.onnx_adapter")).encode(),
            lambda: model.run(Request({"x": np.ones((1, 2, 4), np.float32)}, {"adapter": "a"})),
        )
    finally:
        model._folder = folder


REQUESTS = (
    {
        "inputs": {"x": {"data": [[[1, 2, 3, 4]]], "dtype": "float32"}},
        "parameters": {"adapter": "a1"},
        "outputs": ["y"],
    },
    {
        "inputs": {"x": {"data": [[[1, 2, 3, 4]], [[5, 6, 7, 8]]], "dtype": "float32"}},
        "parameters": {},
        "outputs": None,
    },
    {"inputs": {"x": [[[1.5, 2, 3, 4]]]}, "parameters": {"adapter": ""}},
)


def _array(said: Any) -> Any:
    """What a JSON value means as an input; any Python object may come from a server's own front end."""
    if not isinstance(said, dict) or "dtype" not in said:
        return said
    try:
        made = np.array(said.get("data"), dtype=said["dtype"] if said["dtype"] in DTYPES else None)
        return made.reshape(said["shape"]) if "shape" in said else made
    except (ValueError, TypeError, OverflowError, RecursionError):
        return said


def read_request(data: bytes, path: Path) -> None:
    """One request alone and beside a right one, to both kinds of model; the right one is answered."""
    from oftfx.serving import Request

    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        said = {"inputs": {"x": data}}
    said = said if isinstance(said, dict) else {"inputs": said}
    inputs = said.get("inputs", {})
    inputs = {k: _array(v) for k, v in inputs.items()} if isinstance(inputs, dict) else inputs
    wrong = Request(inputs, said.get("parameters", {}), said.get("outputs"))
    right = Request({"x": np.ones((1, 1, 4), np.float32)}, {"adapter": "a2"})
    swappable, mixed = _served()
    for model in (swappable, mixed):
        answers = model.run_all([wrong, right])
        assert isinstance(answers[1], dict), answers[1]
        assert answers[1]["y"].shape == (1, 1, 4)
    every(lambda: swappable.run(wrong), lambda: mixed.run(wrong))


ANSWERS = (
    {
        "status": 200,
        "answers": [{"data": [{"id": "m"}, {"id": "a", "parent": "m"}]}, {"choices": [{"token_ids": [1, 2, 3]}]}],
    },
    {
        "status": 200,
        "answers": [
            [{"name": "m"}],
            {
                "inputs": [
                    {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]},
                    {"name": "past_key_values.0.key", "datatype": "FP32", "shape": [-1, 2, -1, 4]},
                ]
            },
            {"outputs": [{"name": "logits", "datatype": "FP32", "shape": [1, 3, 4], "data": [0.5] * 12}]},
        ],
    },
    {"status": 500, "answers": ["no"]},
)


def read_answers(data: bytes, path: Path) -> None:
    """A server that says this, in this order, to whoever asks what."""
    try:
        said = json.loads(data)
        status, bodies = said["status"], [json.dumps(a).encode() for a in said["answers"]]
    except (ValueError, RecursionError, KeyError, TypeError):
        status, bodies = 200, [data]

    def each(*calls: Any) -> None:
        for call in calls:
            left = list(bodies) or [b""]

            def open_(request: Any, timeout: float, left: list[bytes] = left) -> Any:
                body = left.pop(0) if len(left) > 1 else left[0]
                if status != 200:
                    raise urllib.error.HTTPError(request.full_url, 500, "odd", {}, io.BytesIO(body))  # type: ignore[arg-type]
                return io.BytesIO(body)

            with patch("urllib.request.urlopen", open_):
                every(call)

    ids = torch.arange(3).view(1, 3)
    every(
        lambda: each(lambda: connect("http://h")),
        lambda: each(lambda: OpenAIServer("http://h", "", "", 1.0).tokens([1, 2], 3)),
        lambda: each(lambda: InferenceServer("http://h", "", "a", 1.0).logits(ids)),
        lambda: each(lambda: InferenceServer("http://h", "m", "", 1.0).logits(ids)),
    )


GRAPHS = Target("graphs", graphs_, read_graph, (), ("onnx", "onnxruntime"))
ONNX_ADAPTERS = Target("onnx_adapters", adapters, read_adapter, (), ("onnx", "onnxruntime"))
SERVED = Target(
    "requests",
    lambda path: [json.dumps(r).encode() for r in REQUESTS],
    read_request,
    ("adapter", "a1", "a2", "Adapter", "x", "y", "dtype", "data", "shape", *DTYPES, "../adapters/a1"),
    ("onnx", "onnxruntime"),
)
ANSWERED = Target(
    "answers",
    lambda path: [json.dumps(a).encode() for a in ANSWERS],
    read_answers,
    (
        "id",
        "data",
        "parent",
        "choices",
        "token_ids",
        "name",
        "inputs",
        "outputs",
        "shape",
        "datatype",
        "logits",
        "input_ids",
    ),
)
