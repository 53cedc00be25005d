"""ONNX Runtime against torch, on fresh inputs of other shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.switch import disable_adapters
from oftfx.errors import ExportError
from oftfx.modes import evaluating
from oftfx.onnx.inputs import DynamicShapes, flat_outputs, resized
from oftfx.passes.protocol import relative_error

# Largest relative error of any output. Measured: float32 1e-6, float16 6e-4.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3}


@dataclass(frozen=True)
class Verification:
    """One comparison.

    Attributes:
        shapes: shape of every input.
        relative_error: largest over the outputs, Frobenius.
        max_abs_error: largest over all elements.
        adapter_effect: relative change that the adapters make to the outputs; None where none acts.
    """

    shapes: dict[str, tuple[int, ...]]
    relative_error: float
    max_abs_error: float
    adapter_effect: float | None

    def __str__(self) -> str:
        shapes = ", ".join(f"{n} {s}" for n, s in self.shapes.items())
        effect = "" if self.adapter_effect is None else f", adapter's own effect {self.adapter_effect:.1e}"
        return f"{shapes}: relative error {self.relative_error:.1e}, largest {self.max_abs_error:.1e}{effect}"


def verify_onnx(
    path: Path,
    reference: nn.Module,
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    shapes: DynamicShapes,
    outputs: tuple[str, ...],
    active: tuple[str, ...],
    deviation: float = 0.0,
) -> tuple[Verification, ...]:
    """Compare the file with ``reference`` on two other shapes (or the example's own, where all are fixed).

    Args:
        path: the file.
        reference: what it has to compute.
        model: the model as given, to measure what its adapters do.
        inputs: example inputs.
        shapes: names of the dynamic axes.
        outputs: names of the outputs.
        active: adapters that act.
        deviation: largest relative change of a quantized weight that the file may make; see `lower_quantized`. Results
            may differ by ten times that, as it adds up over the layers.

    Raises:
        ExportError: ONNX Runtime refuses the file, a result differs by more than rounding, or the difference is not
            far below what the adapters change (so that a file that lost its adapter cannot pass).
    """
    import onnxruntime

    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise ExportError(f"ONNX Runtime does not load {path.name}: {error}") from error
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    checks = []
    for seed, sizes in enumerate(_sizes(inputs, shapes)):
        fresh = resized(inputs, shapes, sizes, seed, vocabulary)
        checks.append(_check(session, reference, model, fresh, outputs, active, 10 * deviation))
    return tuple(checks)


def _sizes(inputs: Mapping[str, Tensor], shapes: DynamicShapes) -> list[dict[str, int]]:
    example = {name: inputs[i].shape[axis] for i, axes in shapes.items() if i in inputs for axis, name in axes.items()}
    if not example:
        return [{}]
    other = {n: s + (1 if n == "batch" else 3) for n, s in example.items()}
    single = {n: 1 if n == "batch" else s for n, s in example.items()}
    return [other, single]


@torch.no_grad()
def _check(
    session: object,
    reference: nn.Module,
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: tuple[str, ...],
    active: tuple[str, ...],
    allowed: float,
) -> Verification:
    expected = dict(flat_outputs(reference(**inputs), tuple(inputs)))
    feed = {n: v.detach().cpu().numpy() for n, v in inputs.items()}
    shapes = {n: tuple(v.shape) for n, v in inputs.items()}
    try:
        known = {i.name for i in session.get_inputs()}  # type: ignore[attr-defined]
        values = session.run(list(outputs), {n: v for n, v in feed.items() if n in known})  # type: ignore[attr-defined]
    except Exception as error:  # its exceptions have no common base
        raise ExportError(f"ONNX Runtime fails on {shapes}: {error}") from error
    worst, largest = 0.0, 0.0
    for name, value in zip(outputs, values, strict=True):
        want, got = expected[name].cpu(), torch.from_numpy(value)
        if want.shape != got.shape:
            raise ExportError(
                f"output {name} has shape {tuple(got.shape)} in ONNX Runtime, {tuple(want.shape)} in torch"
            )
        distance = relative_error(got, want)
        bound = max(BOUNDS.get(want.dtype, 0.0), allowed if want.is_floating_point() else 0.0)
        if not distance <= bound:
            raise ExportError(
                f"output {name} on {shapes}: ONNX Runtime differs from torch by a relative {distance:.2e}, "
                f"allowed {bound:g}"
            )
        worst = max(worst, distance)
        largest = max(largest, float((got.double() - want.double()).abs().max())) if want.numel() else largest
    effect = _adapter_effect(model, inputs, expected) if active else None
    if effect and worst > effect / 10:
        raise ExportError(
            f"on {shapes}: the error {worst:.2e} is not far below what the adapters change ({effect:.2e}), so it "
            "cannot be told whether the file contains them. For an adapter that is to change so little: verify=False"
        )
    return Verification(shapes, worst, largest, effect)


def _adapter_effect(model: nn.Module, inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    with evaluating(model), disable_adapters(model):
        base = dict(flat_outputs(model(**inputs), tuple(inputs)))
    return max(relative_error(base[n], expected[n]) for n in expected if expected[n].is_floating_point())
