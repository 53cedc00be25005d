"""What a recorded graph may be called with, checked by the graph itself."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn as nn

from oftfx.errors import GuardError
from oftfx.trace.torch_private import pytree, size_name, sizes_hold


class ShapeGuard(nn.Module):
    """First node of a recorded graph: refuses calls that the recording does not stand for.

    Args:
        model: class name of the model, for messages.
        example: the arguments it was recorded with, by name; symbolic sizes are free.
        expression: the conditions on sizes that the recording relied on, as torch writes them, or "".
        asked: what the model asked of its tensors besides: ``"strides"``, ``"gradients"``; those have to be the same.

    Attributes:
        recorded_training: the mode of the recording where the graph depends on it, else None.
        recorded_gradients: whether gradients were enabled in it, where the graph depends on that, else None.
    """

    def __init__(self, model: str, example: dict[str, Any], expression: str, asked: Collection[str] = ()) -> None:
        super().__init__()
        self.model, self.expression = model, expression
        self.recorded_training: bool | None = None
        self.recorded_gradients: bool | None = None
        self.asked = frozenset(asked)
        self.arguments = tuple(example)
        self.structures = {n: pytree.tree_structure(v) for n, v in example.items()}
        # Of each leaf its name and, for a tensor, dtype and shape (None where free); for anything else its value.
        self.leaves: list[tuple[str, torch.dtype | None, Any]] = []
        self.details: list[dict[str, Any]] = []
        for name, value in example.items():
            for path, leaf in pytree.tree_flatten_with_path(value)[0]:
                self.leaves.append((name + pytree.keystr(path), *_recorded(leaf)))
                self.details.append(self._details(leaf))

    def forward(self, *values: Any) -> None:
        """Check every argument, in the order they were recorded.

        Raises:
            GuardError: a value differs in a way that the graph cannot follow.
        """
        if self.recorded_training is not None and self.training != self.recorded_training:
            self._refuse("mode", _mode(self.training), _mode(self.recorded_training))
        if self.recorded_gradients is not None and torch.is_grad_enabled() != self.recorded_gradients:
            self._refuse("gradients", _enabled(not self.recorded_gradients), _enabled(self.recorded_gradients))
        found: list[Any] = []
        for name, value in zip(self.arguments, values, strict=True):
            leaves, structure = pytree.tree_flatten(value)
            if structure != self.structures[name]:
                self._refuse(name, f"the structure {structure}", f"{self.structures[name]}")
            found += leaves
        tensors = []
        for (name, dtype, recorded), details, leaf in zip(self.leaves, self.details, found, strict=True):
            if dtype is None:
                if leaf is not recorded and (type(leaf) is not type(recorded) or leaf != recorded):
                    self._refuse(name, repr(leaf), repr(recorded))
                continue
            self._check_tensor(name, leaf, dtype, recorded)
            for what, now in self._details(leaf).items():
                if now != details[what]:
                    self._refuse(f"{name}.{what}", now, details[what])
            tensors.append(leaf)
        if self.expression and not sizes_hold(self.expression, tensors):
            names = [n for n, d, _ in self.leaves if d is not None]
            sizes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(names, tensors, strict=True))
            self._refuse("sizes", sizes, f"sizes with {_readable(self.expression, names)}")

    def _check_tensor(self, name: str, value: Any, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
        if not isinstance(value, torch.Tensor):
            self._refuse(name, type(value).__name__, "a tensor")
        if value.dtype != dtype:
            self._refuse(name, value.dtype, dtype)
        if value.dim() != len(shape) or not all(map(_fits, value.shape, shape)):
            self._refuse(name, f"shape {tuple(value.shape)}", f"shape {_shape(shape)}")

    def _details(self, value: Any) -> dict[str, Any]:
        """What else has to be the same of a tensor, because the model asked for it."""
        if not self.asked or not isinstance(value, torch.Tensor):
            return {}
        found: dict[str, Any] = {"requires_grad": value.requires_grad} if "gradients" in self.asked else {}
        if "strides" in self.asked:
            strides = [int(s) for s in value.stride()]
            order = sorted(range(len(strides)), key=lambda i: -strides[i])
            found["strides"] = f"{'' if value.is_contiguous() else 'not '}contiguous, axes {order} in memory"
        return found

    def _refuse(self, what: str, got: object, expected: object) -> None:
        raise GuardError(
            f"graph of {self.model}: {what}: got {got}, recorded for {expected}. "
            "Record again with such inputs (oftfx.graph), or call the model itself"
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {_shape(shape)}" for name, dtype, shape in self.leaves if dtype is not None)


def _recorded(leaf: Any) -> tuple[torch.dtype | None, Any]:
    if not isinstance(leaf, torch.Tensor):
        return None, leaf
    return leaf.dtype, tuple(None if isinstance(s, torch.SymInt) else int(s) for s in leaf.shape)


def _fits(size: int, recorded: int | None) -> bool:
    return recorded is None or size == recorded


def _mode(training: bool) -> str:
    return "training" if training else "eval"


def _enabled(gradients: bool) -> str:
    return "enabled" if gradients else "disabled"


def _shape(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("*" if s is None else str(s) for s in shape) + ")"


_LONGEST = 400


def _readable(expression: str, names: list[str]) -> str:
    for index, name in enumerate(names):
        expression = expression.replace(size_name(index), name)
    return expression if len(expression) <= _LONGEST else f"{expression[:_LONGEST]} ... (more conditions)"
