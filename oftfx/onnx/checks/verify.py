"""ONNX Runtime against torch, on fresh inputs of other shapes."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oftfx.errors import ExportError
from oftfx.onnx.adapters import Case
from oftfx.onnx.attempt import Attempt
from oftfx.precision import relative_error

# Largest relative error of any output. Measured: float32 1e-6, float16 6e-4.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3}


def allowed_error(dtype: torch.dtype, deviation: float) -> float:
    """Largest relative error of a result, in a file that may change weights by ``deviation``, which adds up."""
    return max(BOUNDS.get(dtype, 0.0), 10 * deviation if dtype.is_floating_point else 0.0)


class DifferentError(ExportError):
    """A file does not compute what the model does.

    Attributes:
        inputs: on which it was seen.
        case: for which adapters.
    """

    def __init__(self, message: str, inputs: Mapping[str, Tensor], case: Case) -> None:
        super().__init__(message)
        self.inputs, self.case = dict(inputs), case


@dataclass(frozen=True)
class Verification:
    """One comparison.

    Attributes:
        shapes: shape of every input; see `shapes_of`.
        relative_error: largest over the outputs, Frobenius.
        max_abs_error: largest over all elements.
        adapter_effect: relative change that the adapters make to the outputs; None where none acts.
        case: which adapters were given, where the file leaves a choice.
    """

    shapes: dict[str, tuple[int, ...]]
    relative_error: float
    max_abs_error: float
    adapter_effect: float | None
    case: str = ""

    def __str__(self) -> str:
        shapes = ", ".join(f"{n} {s}" for n, s in self.shapes.items())
        effect = "" if self.adapter_effect is None else f", adapter's own effect {self.adapter_effect:.1e}"
        case = f" {self.case}" if self.case else ""
        return f"{shapes}{case}: relative error {self.relative_error:.1e}, largest {self.max_abs_error:.1e}{effect}"


def shapes_of(inputs: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name; inputs of one shape whose names differ in a number only are one entry, with ``*`` for it."""
    return {re.sub(r"(?<=\.)\d+(?=\.)", "*", n): tuple(v.shape) for n, v in inputs.items()}


def open_session(path: Path) -> Any:
    """An ONNX Runtime session on the CPU, at the optimisation level that users run.

    Raises:
        ExportError: it refuses the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise ExportError(f"ONNX Runtime does not load {path.name}: {error}") from error


def run_session(session: Any, names: tuple[str, ...], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Outputs of a session; inputs that the graph does not have are left out.

    Raises:
        ExportError: it fails.
    """
    known = {i.name for i in (*session.get_inputs(), *session.get_overridable_initializers())}
    feed = {n: v.detach().cpu().numpy() for n, v in inputs.items() if n in known}
    try:
        return [torch.from_numpy(v) for v in session.run(list(names), feed)]
    except Exception as error:  # its exceptions have no common base
        shapes = shapes_of({n: v for n, v in inputs.items() if not n.endswith(".blocks")})
        raise ExportError(f"ONNX Runtime fails on {shapes}: {error}") from error


@torch.no_grad()
def verify_onnx(path: Path, attempt: Attempt, level: int | None = None) -> tuple[Verification, ...]:
    """Compare the file with torch on two other shapes (or the example's own, where all are fixed).

    Args:
        path: the file.
        attempt: what it was made by, and what it has to compute.
        level: the ``accuracy_level`` of a file that was verified without it: its error is measured and not bounded.

    Raises:
        DifferentError: a result differs by more than rounding, or the difference is not far below what the adapters
            change (so that a file that lost its adapter cannot pass).
        ExportError: ONNX Runtime refuses the file.
    """
    session = open_session(path)
    checks = []
    for seed, sizes in enumerate(attempt.signature.sizes()):
        inputs = attempt.signature.fresh(sizes, seed)
        cases = attempt.mode.cases(attempt.reference, attempt.signature, inputs)
        checks += [_check(session, case, attempt, inputs, level) for case in cases]
    return tuple(checks)


_FAR, _ALIKE = 10.0, 3.0
"""Times the bound from which no rounding is thought of; and how much further from float64 a file may be than torch."""


def _rounds_as_torch(
    got: Tensor, want: Tensor, name: str, case: Case, attempt: Attempt, inputs: Mapping[str, Tensor], bound: float
) -> bool:
    """Whether a file that is a little over the bound is no further from the model in float64 than torch is.

    Some models round more than others: where a few activations are thousands of times the rest, as at the first token
    of a language model, float32 itself is 1e-5 off.
    """
    if not relative_error(got, want) <= _FAR * bound or want.dtype != torch.float32 or case.model is None:
        return False
    try:
        wide = copy.deepcopy(case.model).double()
        floats = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
        exact = attempt.signature.run(wide, floats)[name]
    except Exception:  # quantized layers, say, have no such form
        return False
    exact = attempt.signature.comparable(name, exact, inputs).cpu()
    own = relative_error(want, exact)
    return own <= _FAR * bound and relative_error(got, exact) <= _ALIKE * own


def _check(session: Any, case: Case, attempt: Attempt, inputs: Mapping[str, Tensor], level: int | None) -> Verification:
    signature, outputs = attempt.signature, attempt.outputs

    def comparable(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: signature.comparable(n, v, inputs) for n, v in found.items()}

    expected = comparable(case.expected(inputs))
    shapes = shapes_of(inputs)
    where = f"on {shapes}" + (f" {case.label}" if case.label else "")
    worst, largest = 0.0, 0.0
    for name, got in zip(outputs, run_session(session, outputs, {**inputs, **case.given}), strict=True):
        want = expected[name].cpu()
        if want.shape != got.shape:
            raise DifferentError(
                f"output {name} {where} has shape {tuple(got.shape)} in ONNX Runtime, {tuple(want.shape)} in torch",
                inputs,
                case,
            )
        got = signature.comparable(name, got, inputs)
        distance = relative_error(got, want)
        bound = allowed_error(want.dtype, attempt.deviation) if level is None else float("inf")
        if not distance <= bound and not _rounds_as_torch(got, want, name, case, attempt, inputs, bound):
            raise DifferentError(
                f"output {name} {where}: ONNX Runtime differs from torch by a relative {distance:.2e}, "
                f"allowed {bound:g}",
                inputs,
                case,
            )
        worst = max(worst, distance)
        largest = max(largest, float((got.double() - want.double()).abs().max())) if want.numel() else largest
    effect = None
    if case.base is not None:
        base = comparable(case.base(inputs))
        floats = [n for n in expected if expected[n].is_floating_point()]
        effect = max((relative_error(base[n], expected[n]) for n in floats), default=None)
        if effect and worst > effect / 10 and level is None:
            raise DifferentError(
                f"{where}: the error {worst:.2e} is not far below what the adapters change ({effect:.2e}), so it "
                "cannot be told whether the file contains them. For an adapter that is to change so little: "
                "verify=False",
                inputs,
                case,
            )
    label = case.label if level is None else f"{case.label} at accuracy_level {level}".strip()
    return Verification(shapes, worst, largest, effect, label)
