"""What a recording knows of torch's functions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch

OPERATORS = {
    f"__{name}__": getattr(operator, alias)
    for name, alias in [
        *((n, n) for n in ("add", "sub", "mul", "truediv", "floordiv", "mod", "matmul", "pow", "neg", "invert")),
        *((n, n) for n in ("eq", "ne", "lt", "le", "gt", "ge", "getitem", "setitem")),
        *((n, f"{n}_") for n in ("and", "or", "xor")),
    ]
    if hasattr(operator, alias)
}
"""Tensor methods that are written as operators; a graph reads better with the operator."""

METHODS = {
    function: name
    for name, function in vars(torch.Tensor).items()
    if isinstance(function, FunctionType) and function.__name__ != name and function.__module__ == "torch._tensor"
}
"""Tensor methods in Python that do not know their own name: ``x ** 2`` calls ``__pow__``, which says it is ``pow``."""

DATA_DEPENDENT = frozenset(
    [
        "item",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "tolist",
        "nonzero",
        "masked_select",
        "unique",
        "unique_consecutive",
    ]
)
"""What turns tensor values into Python values or shapes: the program then depends on data."""

QUESTIONS = {
    **dict.fromkeys(["is_contiguous", "stride", "storage_offset"], "strides"),
    **dict.fromkeys(["requires_grad", "grad_fn", "is_leaf", "grad"], "gradients"),
}
"""Methods and attributes whose answer may steer Python, and depends on more of an input than its size and dtype."""


def items_of(out: Any) -> Iterator[tuple[Any, Any, Callable[..., Any]]]:
    """Key, value and getter of what a function returned in a container."""
    if isinstance(out, dict):
        yield from ((k, v, operator.getitem) for k, v in out.items())
    elif isinstance(out, (tuple, list)):
        yield from ((i, v, operator.getitem) for i, v in enumerate(out))
    elif hasattr(out, "__dataclass_fields__"):
        yield from ((k, getattr(out, k), getattr) for k in out.__dataclass_fields__)
