"""Export a folded or an unfolded model to ONNX, and prove that the file computes what the model does."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn

from oftfx.adapter.store import drop_store, find_store, unwrapped
from oftfx.errors import ExportError, MissingExtraError
from oftfx.formats import format_of
from oftfx.kernel import use_exact
from oftfx.onnx.finish import finish
from oftfx.onnx.inputs import DynamicShapes, auto_dynamic_shapes, named_inputs, output_names, widened
from oftfx.onnx.lower import lower_quantized
from oftfx.onnx.verify import Verification, verify_onnx
from oftfx.passes.freeze_rotations import FreezeRotations
from oftfx.passes.protocol import PassManager
from oftfx.program import Program
from oftfx.structure import structural_copy
from oftfx.trace.inputs import ExampleInputs, capture_settings

Dialect = Literal["ort", "standard", "openvino"]
Adapters = Literal["fixed", "swappable", "inputs"]
DEFAULT_OPSET = 20  # what torch's exporter writes and ONNX Runtime >= 1.18 loads


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far ONNX Runtime's results are from torch's.

    Attributes:
        path: the file.
        inputs: input names with their dynamic axes.
        outputs: output names.
        opset: opset of the standard operators.
        operators: how often each operator occurs.
        nbytes: size of the file and its external data.
        adapters: adapters that act in the file; empty for a folded or plain model.
        checks: one `Verification` a shape; empty without ``verify``.
    """

    path: Path
    inputs: dict[str, dict[int, str]]
    outputs: tuple[str, ...]
    opset: int
    operators: dict[str, int]
    nbytes: int
    adapters: tuple[str, ...]
    checks: tuple[Verification, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.nbytes / 2**20:.1f} MiB, {sum(self.operators.values())} nodes, opset {self.opset}"
        ]
        lines += [f"verified in ONNX Runtime on {c}" for c in self.checks]
        return "\n".join(lines)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: ExampleInputs = None,
    *,
    adapters: Adapters = "fixed",
    dynamic_shapes: DynamicShapes | Literal["auto"] | None = "auto",
    dialect: Dialect = "ort",
    opset: int | None = None,
    verify: bool = True,
) -> ExportReport:
    """Write ``model`` as an ONNX file. The model itself is not changed.

    A folded model becomes plain ``MatMul``/``Gemm``. Active rotations become ``Reshape, Transpose, MatMul, Transpose,
    Reshape`` with their blocks as initializers; the Cayley transform is computed before, in torch. Quantized weights
    keep their bits, in operators of the dialect; the file computes the product with the dequantized weight.

    Args:
        model: folded, transformed or plain; float32, float16 or float64.
        path: the ``.onnx`` file. Weights over 1.5 GB go to ``<path>.data`` beside it.
        example_inputs: see `oftfx.plan`. Axes of length 1 that are dynamic are widened, or they would be fixed.
        adapters: ``"fixed"``: the active adapters are part of the file.
        dynamic_shapes: ``"auto"``: axis 0 of every input is ``batch``, axis 1 of integer matrices ``sequence``; or
            ``{input: {axis: name}}``; or None for fixed shapes.
        dialect: ``"ort"`` may use ONNX Runtime's own operators; ``"standard"`` only those of the ONNX standard;
            ``"openvino"`` what OpenVINO computes right.
        opset: opset of the standard operators; None: 20, or 21 where a quantized weight needs it.
        verify: run ONNX Runtime against torch on fresh inputs of other shapes and refuse a file that differs.

    Returns:
        See `ExportReport`.

    Raises:
        MissingExtraError: the ``onnx`` extra is not installed.
        ExportError: the model cannot be exported, or the file does not compute what it does; no file is left behind.
    """
    _require_packages(verify)
    _check_arguments(adapters, dialect)
    path = Path(path)
    model = unwrapped(model)
    inputs = named_inputs(model, example_inputs)
    shapes = auto_dynamic_shapes(inputs) if dynamic_shapes == "auto" else _plain(dynamic_shapes, inputs)
    store = find_store(model)
    active = store.active if store is not None else ()
    torch_model = structural_copy(model).eval()
    reference = _reference(torch_model)
    lowered, least, needs, deviation = lower_quantized(structural_copy(reference), dialect)
    _check_dtypes(lowered)
    chosen = _opset(opset, least, needs, dialect)
    examples = widened(inputs, shapes)
    with capture_settings(lowered), capture_settings(reference):
        with torch.no_grad():
            outputs = output_names(reference(**examples), examples)
        program = _export(lowered, examples, shapes, outputs, chosen)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target and under its final name: external data is found by name, and a move is a rename.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
            made = Path(folder) / path.name
            operators, nbytes = finish(program, made, _metadata(model, active))
            checks = verify_onnx(made, reference, model, examples, shapes, outputs, active, deviation) if verify else ()
            _move(made, path)
    return ExportReport(path, shapes, outputs, chosen, operators, nbytes, active, checks)


def _require_packages(verify: bool) -> None:
    import importlib.util

    for package in ("onnx", "onnxscript", "onnx_ir", *(["onnxruntime"] if verify else [])):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "onnx", "ONNX export")


def _check_arguments(adapters: str, dialect: str) -> None:
    if adapters not in ("fixed", "swappable", "inputs"):
        raise ExportError(f"adapters: got {adapters!r}, expected 'fixed', 'swappable' or 'inputs'")
    if adapters != "fixed":
        raise ExportError(f"adapters={adapters!r} is not available in this version; 'fixed' bakes the active ones in")
    if dialect not in ("ort", "standard", "openvino"):
        raise ExportError(f"dialect: got {dialect!r}, expected 'ort', 'standard' or 'openvino'")


def _check_dtypes(lowered: nn.Module) -> None:
    narrow = next((n for n, p in lowered.named_parameters() if p.dtype == torch.bfloat16), None)
    if narrow is not None:
        raise ExportError(
            f"{narrow} is bfloat16, for which ONNX Runtime has no CPU kernels; export model.float() or model.half()"
        )


def _plain(shapes: DynamicShapes | None, inputs: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    if unknown := sorted(set(shapes or {}) - set(inputs)):
        raise ExportError(f"dynamic_shapes: no input {unknown[0]!r}; the inputs are {', '.join(inputs)}")
    return {name: dict(axes) for name, axes in (shapes or {}).items()}


def _opset(asked: int | None, least: int, needs: str, dialect: str) -> int:
    if asked is not None and asked < least:
        raise ExportError(
            f"{needs}: its quantized weight needs opset {least} in dialect {dialect!r}, and opset={asked} was asked "
            "for; leave opset out, or fold with quantized='float' first"
        )
    return asked or max(DEFAULT_OPSET, least)


def _reference(model: nn.Module) -> nn.Module:
    """What the file has to compute, in torch: rotations as fixed blocks, quantized layers by their dequantized weight.

    Some formats' own forwards round activations as well, or cannot run on this machine.
    """
    PassManager([FreezeRotations()]).run(Program.of(model))
    drop_store(model)
    for module in model.modules():
        weight_format = format_of(module)
        if weight_format is not None and not weight_format.lossless:
            weight_format.prepare(module)
            use_exact(module)
    return model.requires_grad_(False)


def _export(
    model: nn.Module, inputs: Mapping[str, Any], shapes: DynamicShapes, outputs: tuple[str, ...], opset: int
) -> Any:
    dynamic = {name: dict(shapes.get(name, {})) for name in inputs} if any(shapes.values()) else None
    try:
        with _quiet():
            return torch.onnx.export(
                model,
                kwargs=dict(inputs),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=dynamic,
                opset_version=opset,
                dynamo=True,
                optimize=False,  # oftfx.onnx.optimize does it
                verbose=False,
            )
    except Exception as error:
        cause = str(error).strip().splitlines()
        raise ExportError(
            f"{type(model).__name__} cannot be exported: {type(error).__name__}: {' '.join(cause[:3])[:600]}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress and warns about its own internals; what matters raises."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _metadata(model: nn.Module, active: tuple[str, ...]) -> dict[str, str]:
    from oftfx import __version__

    return {
        "oftfx.version": __version__,
        "oftfx.model": type(model).__name__,
        "oftfx.adapters": ",".join(active),
        "oftfx.state": "unfolded" if active else "folded or plain",
    }


def _move(made: Path, path: Path) -> None:
    """The data first: a model file never points to data that is not there. Data of an older file goes."""
    _data(path).unlink(missing_ok=True)
    if _data(made).exists():
        os.replace(_data(made), _data(path))
    os.replace(made, path)


def _data(path: Path) -> Path:
    return path.with_name(path.name + ".data")
