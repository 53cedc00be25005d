"""Finish an exported program: names and metadata in, local paths out, written with external data where it is large."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oftfx.onnx.adapters import AdapterMode
from oftfx.onnx.fused.norms import blank_unused, fuse_norms, known_to_checker
from oftfx.onnx.optimize import optimize, tidy

LARGE = 1_500_000_000  # a protobuf ends at 2 GiB
SMALL = 1024  # bytes; smaller tensors stay in the model file


def finish(
    program: Any, path: Path, metadata: Mapping[str, str], mode: AdapterMode, dialect: str
) -> tuple[dict[str, int], int]:
    """Write an ``ONNXProgram`` and check the file.

    Args:
        program: what torch's exporter returned.
        path: the file; large weights go to ``<path>.data`` beside it.
        metadata: goes into the file's ``metadata_props``.
        mode: gives its inputs their defaults.
        dialect: ``"ort"`` gets ONNX Runtime's own operators for what they compute exactly.

    Returns:
        How often each operator occurs, and the bytes written.
    """
    import onnx
    import onnx_ir as ir

    model = program.model
    optimize(model)
    if dialect == "ort" and fuse_norms(model):
        tidy(model)
        blank_unused(model)
    mode.set_defaults(model.graph)
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        # The exporter leaves stack traces with local paths in every node: most of a small file.
        graph.metadata_props.clear()
        graph.doc_string = None
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    model.doc_string, model.producer_name = None, "oftfx"
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if size > LARGE:
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=SMALL)
    else:
        ir.save(model, path)
    with known_to_checker():
        onnx.checker.check_model(str(path), full_check=True)
    operators = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph.all_nodes())
    written = path.stat().st_size + sum(p.stat().st_size for p in path.parent.glob(f"{path.name}.data"))
    return dict(operators.most_common()), written
