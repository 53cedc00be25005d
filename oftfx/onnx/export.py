"""Export a folded or an unfolded model to ONNX, and prove that the file computes what the model does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn

from oftfx.adapter.store import drop_store, unwrapped
from oftfx.errors import ExportError, MissingExtraError
from oftfx.files import check_place, landing
from oftfx.formats.exact import use_exact
from oftfx.formats.registry import format_of
from oftfx.model.compressed import keep_compressed
from oftfx.model.structure import structural_copy
from oftfx.onnx.accuracy import check_level, set_level
from oftfx.onnx.adapters import MODES
from oftfx.onnx.attempt import Attempt
from oftfx.onnx.checks.bisect import first_difference
from oftfx.onnx.checks.verify import DifferentError, Verification, verify_onnx
from oftfx.onnx.decoders.fused import FusedDecoder, decoder_of
from oftfx.onnx.describe import describe
from oftfx.onnx.exportable import Exportable, onnx_program
from oftfx.onnx.finish import finish
from oftfx.onnx.inputs import DynamicShapes, auto_dynamic_shapes, named_inputs, widened
from oftfx.onnx.lower import lower_quantized
from oftfx.onnx.report import ExportReport
from oftfx.onnx.signature import Signature
from oftfx.passes.freeze_rotations import FreezeRotations
from oftfx.passes.protocol import PassManager
from oftfx.placement.find import check_unaware
from oftfx.placement.rows import check_no_rows
from oftfx.planning.program import Program
from oftfx.serving.copied.runtime.contract import ATTENTION
from oftfx.trace.inputs import ExampleInputs, capture_settings

Dialect = Literal["ort", "standard", "openvino"]
Adapters = Literal["fixed", "swappable", "inputs", "mixed"]
LEAST_OPSET = 18  # below, what the exporter writes cannot be said
DEFAULT_OPSET = 20  # what torch's exporter writes and ONNX Runtime >= 1.18 loads


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: ExampleInputs = None,
    *,
    adapters: Adapters = "fixed",
    cache: bool = False,
    fused: bool | None = False,
    accuracy_level: int | None = None,
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
        adapters: ``"fixed"``: the active adapters are part of the file. ``"swappable"``: each rotation's blocks are an
            input ``<site>.oft.blocks`` whose default is the identity, so one session serves the base model and every
            adapter with the sites and block sizes of the active one; `export_onnx_adapter` writes them. ``"inputs"``:
            the same without a default, for runtimes that make constants of defaults (OpenVINO does, silently).
            ``"mixed"``: all adapters of the model are in the file, and the input ``adapter_index`` int64 ``(batch,)``
            chooses one for each row; 0 is the base model, then they follow in the order of `oftfx.adapters`.
        cache: of a causal language model, also take and give its cache, so that one graph reads a prompt and decodes;
            see `oftfx.onnx.decoders.decoder.Decoder` for the names and `oftfx.export_genai` for a directory that ONNX
            Runtime GenAI runs.
        fused: with ``cache``, attention as ONNX Runtime's ``GroupQueryAttention``, which also rotates queries and keys
            and can write into a cache that is as long as the context. Prompts are padded on the right then, and there
            are no ``position_ids`` where it rotates; see `oftfx.onnx.decoders.fused.FusedDecoder`. False: attention in
            plain operators, which takes padding on the left. None: fused where the model's attention is what the
            operator computes; the report says what came of it.
        accuracy_level: what ``MatMulNBits`` may round activations to, ``4``: int8, which is faster and not exact. The
            file is first verified without it; then its error with it, which nothing bounds, is among ``checks``. None:
            floats.
        dynamic_shapes: ``"auto"``: batches and sequences, by the inputs' names and lengths; see
            `oftfx.onnx.inputs.auto_dynamic_shapes`. Or ``{input: {axis: name}}``; or None for fixed shapes.
        dialect: ``"ort"`` may use ONNX Runtime's own operators; ``"standard"`` only those of the ONNX standard;
            ``"openvino"`` what OpenVINO computes right.
        opset: opset of the standard operators; None: 20, or 21 where a quantized weight needs it.
        verify: run ONNX Runtime against torch on fresh inputs of other shapes and refuse a file that differs.

    Returns:
        See `ExportReport`.

    Raises:
        MissingExtraError: the ``onnx`` extra is not installed.
        ExportError: the model cannot be exported, the file does not compute what it does, or it cannot be written. What
            was there is as it was.

    Examples:
        >>> import oftfx, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU())
        >>> report = oftfx.export_onnx(model, "model.onnx", (torch.randn(5, 6),))
        >>> report.inputs, report.operators
        ({'input': {0: 'batch'}}, {'Gemm': 1, 'Relu': 1})
    """
    _require_packages(verify)
    _check_arguments(adapters, dialect)
    check_level(accuracy_level, dialect)
    path = Path(path)
    check_place(path, ExportError)
    model = unwrapped(model)
    check_no_rows(model, "an export")
    check_unaware(model, "an export")
    inputs = named_inputs(model, example_inputs)
    exact = exact_copy(model)
    attention = ""
    if cache:
        if dynamic_shapes != "auto":
            raise ExportError("cache=True: the axes of a decoder's inputs are all dynamic; leave dynamic_shapes out")
        signature: Signature
        signature, attention = decoder_of(exact, inputs, fused, dialect)
    elif fused:
        raise ExportError("fused=True is for decoders with their cache; pass cache=True as well, or leave it out")
    else:
        shapes = auto_dynamic_shapes(inputs) if dynamic_shapes == "auto" else _plain(dynamic_shapes, inputs)
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        signature = Signature(widened(inputs, shapes), shapes, vocabulary)
    mode = MODES[adapters](exact, adapters)
    reference = _frozen(structural_copy(exact))
    lowered, least, needs, deviation = lower_quantized(structural_copy(reference), dialect)
    if isinstance(signature, FusedDecoder):
        signature.fusion.install(lowered)
    _check_dtypes(lowered)
    chosen = _opset(opset, least, needs, dialect)
    mode = mode.prepared(lowered)
    with capture_settings(lowered), capture_settings(reference), capture_settings(exact):
        with torch.no_grad():
            outputs = signature.outputs(reference)
        attempt = Attempt(lowered, reference, mode, signature, outputs, chosen, dialect, deviation)
        program = onnx_program(Exportable(lowered, signature, mode), outputs, chosen)
        # Under its final name, by which external data is found.
        with landing(path.parent, path.name, ExportError, stale=[f"{path.name}.data"]) as folder:
            made = folder / path.name
            notes = describe(model, mode) | ({ATTENTION: attention} if isinstance(signature, FusedDecoder) else {})
            operators, nbytes = finish(program, made, notes, mode, dialect)
            checks: tuple[Verification, ...] = ()
            if verify:
                try:
                    checks = verify_onnx(made, attempt)
                except DifferentError as error:
                    where = first_difference(attempt, error)
                    raise ExportError(f"{error}. {where}") from None
            if accuracy_level is not None:
                set_level(made, accuracy_level)
                checks += verify_onnx(made, attempt, accuracy_level) if verify else ()
    every = {n: dict(axes) for n, axes in (*signature.shapes.items(), *mode.shapes(signature).items())}
    return ExportReport(path, every, outputs, chosen, operators, nbytes, mode.named, checks, attention)


def _require_packages(verify: bool) -> None:
    import importlib.util

    for package in ("onnx", "onnxscript", "onnx_ir", *(["onnxruntime"] if verify else [])):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "onnx", "ONNX export")


def _check_arguments(adapters: str, dialect: str) -> None:
    if adapters not in MODES:
        raise ExportError(f"adapters: got {adapters!r}, expected one of {', '.join(map(repr, MODES))}")
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
    if asked is not None and asked < LEAST_OPSET:
        raise ExportError(f"opset={asked}: files are written in opset {LEAST_OPSET} or later; leave it out")
    if asked is not None and asked < least:
        raise ExportError(
            f"{needs}: its quantized weight needs opset {least} in dialect {dialect!r}, and opset={asked} was asked "
            "for; leave opset out, or fold with quantized='float' first"
        )
    return asked or max(DEFAULT_OPSET, least)


def exact_copy(model: nn.Module) -> nn.Module:
    """A copy that shares the tensors and computes with dequantized weights, in eval mode.

    Some formats' own forwards round activations, repack the weights, or cannot run on this machine.
    """
    copied = structural_copy(model).eval()
    keep_compressed(copied)
    for module in copied.modules():
        weight_format = format_of(module)
        if weight_format is not None and not weight_format.lossless:
            weight_format.prepare(module)
            use_exact(module)
    return copied


def _frozen(model: nn.Module) -> nn.Module:
    """What the file has to compute with the active adapters: rotations as fixed blocks."""
    PassManager([FreezeRotations()]).run(Program.of(model))
    drop_store(model)
    return model.requires_grad_(False)
