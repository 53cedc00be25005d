"""Find the first layer whose result in ONNX Runtime is not torch's."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import ExportError
from oftfx.formats.registry import format_of
from oftfx.model.structure import structural_copy
from oftfx.onnx.attempt import Attempt
from oftfx.onnx.checks.verify import DifferentError, allowed_error, open_session, run_session
from oftfx.onnx.exportable import Exportable, onnx_program
from oftfx.onnx.finish import finish
from oftfx.precision import relative_error


@torch.no_grad()
def first_difference(attempt: Attempt, seen: DifferentError) -> str:
    """Export once more with the result of every layer as an output, and say which is the first to differ.

    Args:
        attempt: the export whose file differs.
        seen: the error, with the inputs and the adapters it was seen with.
    """
    lowered, signature, mode = attempt.lowered, attempt.signature, attempt.mode
    model = seen.case.model
    if model is None:
        return "Export with adapters='swappable' to be told at which layer"
    in_both = {n for n, _ in lowered.named_modules()}
    layers = [n for n, m in model.named_modules() if n in in_both and n and (format_of(m) is not None or _is_leaf(m))]
    expected: dict[str, Tensor] = {}

    def note(name: str) -> None:
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            if isinstance(output, Tensor):
                expected.setdefault(name, output.clone())

        handles.append(model.get_submodule(name).register_forward_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for name in layers:
            note(name)
        results = seen.case.expected(seen.inputs)
    finally:
        for handle in handles:
            handle.remove()
    copied = structural_copy(lowered)
    taps = {n: copied.get_submodule(n) for n in expected}
    names = (*results, *expected)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tapped.onnx"
            program = onnx_program(Exportable(copied, signature, mode, taps), names, attempt.opset)
            finish(program, path, {}, mode, attempt.dialect)
            values = run_session(open_session(path), names, {**seen.inputs, **seen.case.given})
    except ExportError as error:
        return f"Where, cannot be told: {error}"
    found = dict(zip(names, values, strict=True))
    for name, want in expected.items():
        got = found[name]
        want, got = (signature.comparable(name, v, seen.inputs) for v in (want, got))
        if got.shape != want.shape or not relative_error(got, want.cpu()) <= allowed_error(
            want.dtype, attempt.deviation
        ):
            kind = type(model.get_submodule(name)).__name__
            return f"The first layer whose result differs is {name} ({kind})"
    return "No layer's result differs by itself: it is what the model's own code makes of them"


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None
