"""What a recorded graph may be called with, checked by the graph itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from oftfx.errors import GuardError


class ShapeGuard(nn.Module):
    """First node of a recorded graph: refuses calls that the recording does not stand for.

    Args:
        model: class name of the model, for messages.
        inputs: for each tensor input its name, dtype and example shape (None where a dimension is free).
        constants: for each other input its name and the value it had.
        expression: the conditions on sizes that the recording relied on, as torch writes them, or "".
        training: the mode of the recording where the graph depends on it, else None.
    """

    def __init__(
        self,
        model: str,
        inputs: list[tuple[str, torch.dtype, tuple[int | None, ...]]],
        constants: list[tuple[str, Any]],
        expression: str,
        training: bool | None,
    ) -> None:
        super().__init__()
        self.model, self.inputs, self.constants = model, inputs, constants
        self.expression, self.recorded_training = expression, training

    def forward(self, *values: Any) -> None:
        """Check tensors, then the other values, in the order they were recorded.

        Raises:
            GuardError: a value differs in a way that the graph cannot follow.
        """
        tensors, others = values[: len(self.inputs)], values[len(self.inputs) :]
        if self.recorded_training is not None and self.training != self.recorded_training:
            self._refuse("mode", _mode(self.training), _mode(self.recorded_training))
        for (name, dtype, shape), tensor in zip(self.inputs, tensors, strict=True):
            if not isinstance(tensor, torch.Tensor):
                self._refuse(name, type(tensor).__name__, "a tensor")
            if tensor.dtype != dtype:
                self._refuse(name, tensor.dtype, dtype)
            if tensor.dim() != len(shape) or not all(map(_fits, tensor.shape, shape)):
                self._refuse(name, f"shape {tuple(tensor.shape)}", f"shape {_shape(shape)}")
        for (name, expected), value in zip(self.constants, others, strict=True):
            if value is not expected and value != expected:
                self._refuse(name, repr(value), repr(expected))
        if self.expression and not _evaluate(self.expression, tensors):
            sizes = ", ".join(f"{n} {tuple(t.shape)}" for (n, _, _), t in zip(self.inputs, tensors, strict=True))
            self._refuse("sizes", sizes, f"sizes with {_readable(self.expression, self.inputs)}")

    def _refuse(self, what: str, got: object, expected: object) -> None:
        raise GuardError(
            f"graph of {self.model}: {what}: got {got}, recorded for {expected}. "
            "Record again with such inputs (oftfx.graph), or call the model itself"
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {_shape(shape)}" for name, _, shape in self.inputs)


def _fits(size: int, recorded: int | None) -> bool:
    return recorded is None or size == recorded


def _mode(training: bool) -> str:
    return "training" if training else "eval"


def _shape(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("*" if s is None else str(s) for s in shape) + ")"


def _evaluate(expression: str, tensors: tuple[Any, ...]) -> bool:
    """Evaluate conditions that ``ShapeEnv.produce_guards_expression`` wrote; never text from a file."""
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

    return bool(eval(expression, dict(SYMPY_INTERP), {"L": {f"t{i}": t for i, t in enumerate(tensors)}}))


def _readable(expression: str, inputs: list[tuple[str, torch.dtype, tuple[int | None, ...]]]) -> str:
    for index, (name, _, _) in enumerate(inputs):
        expression = expression.replace(f"L['t{index}']", name)
    return expression
