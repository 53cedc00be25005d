"""ONNX files and the adapters beside them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from oftfx.errors import MissingExtraError
from oftfx.inspecting.found import Found, InspectError, Table
from oftfx.inspecting.headers import digest
from oftfx.typed_json import parsed

_KNOWN = ("model", "state", "adapter_mode", "adapters", "adapter_hashes", "interface", "attention", "version", "folds")


def inspect_graph(path: Path) -> Found:
    """Inputs, outputs, operators, size, and what our metadata says of adapters and folds.

    Raises:
        MissingExtraError: onnx is not installed.
        InspectError: it is no ONNX file.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("onnx", "onnx", "Reading an ONNX file") from error
    try:
        model = onnx.load(str(path), load_external_data=False)
        model.ir_version, model.graph.node[0]
    except Exception as error:  # protobuf's own types
        raise InspectError(f"{path} is not an ONNX file, or is damaged: {type(error).__name__}") from None
    try:
        return _of_graph(onnx, model, path)
    except (ValueError, TypeError, RecursionError) as error:  # text that is no UTF-8, and types that ONNX has not
        raise InspectError(f"{path} is not an ONNX file, or is damaged: {error}") from None


def inspect_graph_adapter(path: Path) -> Found:
    """An ``.onnx_adapter``: which graphs it is for, and its blocks.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        InspectError: it is no such file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx", "Reading an .onnx_adapter file") from error
    try:
        found = onnxruntime.AdapterFormat.read_adapter(str(path))
        parameters = found.get_parameters()
    except Exception as error:  # its exceptions have no common base
        raise InspectError(f"{path} is not an .onnx_adapter file, or is damaged: {type(error).__name__}") from None
    facts = {
        "interface of its graphs": str(found.get_model_version()),
        "adapter version": found.get_adapter_version(),
        "rotations": len(parameters),
        "sha256": digest(path),
    }
    rows = [(n, v.data_type(), "x".join(map(str, v.shape()))) for n, v in sorted(parameters.items())]
    return Found("onnx adapter", path, facts, Table("Blocks", ("name", "dtype", "shape"), rows))


def _faults(model: Any, path: Path) -> tuple[str, ...]:
    places = {_text(e.value) for i in model.graph.initializer for e in i.external_data if e.key == "location"}
    missing = [p for p in places if Path(p).name != p or not (path.parent / p).is_file()]
    return tuple(f"its weights should be in {p}, which is not beside it" for p in missing)


def _plain(text: str) -> Any:
    try:
        value = parsed(text)
    except ValueError:
        return text
    if isinstance(value, dict):
        return {k: str(v)[:12] for k, v in value.items()}
    return [json.dumps(v) if isinstance(v, dict) else v for v in value] if isinstance(value, list) else text


def _text(value: str | bytes) -> str:
    """A word of a graph: what is no UTF-8, the protocol buffers' reader gives as bytes."""
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value


def _of_graph(onnx: Any, model: Any, path: Path) -> Found:
    notes = {_text(e.key).removeprefix("oftfx."): _text(e.value) for e in model.metadata_props}
    beside = path.with_name(f"{path.name}.data")
    opsets = {_text(o.domain) or "onnx": o.version for o in model.opset_import}
    counted = Counter(_text(node.op_type) for node in model.graph.node)
    facts: dict[str, Any] = {
        "made by": f"{_text(model.producer_name)} {_text(model.producer_version)}".strip(),
        "opsets": opsets,
        "nodes": sum(counted.values()),
        "operators": dict(counted.most_common(12)),
        "bytes": path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0),
        **{name.replace("_", " "): _plain(notes[name]) for name in _KNOWN if notes.get(name)},
        "sha256": digest(path),
    }
    rows = []
    initial = {i.name for i in model.graph.initializer}
    for kind, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            shape = [_text(d.dim_param) or str(d.dim_value) for d in value.type.tensor_type.shape.dim]
            dtype = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
            rows.append((_text(value.name), "default" if value.name in initial else kind, dtype, "x".join(shape)))
    faults = _faults(model, path)
    return Found("onnx", path, facts, Table("Inputs and outputs", ("name", "kind", "dtype", "shape"), rows), faults)
