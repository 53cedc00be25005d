"""Run a model in eval mode and leave it as it was."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn as nn

Inputs: TypeAlias = Mapping[str, Any] | tuple[Any, ...]
"""Of a model, by keyword or by position."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode afterwards (they may differ: frozen batch norms, say)."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            # `train` of a single module would set its children as well.
            module.training = mode


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run a model."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def input_name(layer: nn.Module, kwargs: Mapping[str, Any]) -> str:
    """Under which name a layer that was called by keyword has got what it reads."""
    return "input" if "input" in kwargs else next(iter(inspect.signature(layer.forward).parameters))


def outputs_of(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """All tensors a model returns for keyword or positional inputs, in eval mode, without gradients."""
    from torch.utils import _pytree as pytree

    with evaluating(model), torch.no_grad():
        out = call(model, inputs)
    return [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
