"""Inputs of an export: names, dynamic axes, and fresh examples of other shapes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import ExportError
from oftfx.trace.inputs import ExampleInputs, example_call

DynamicShapes = Mapping[str, Mapping[int, str]]


def named_inputs(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, Tensor]:
    """Example inputs by argument name, in the order of the model's signature.

    Raises:
        ExportError: an input that is not a tensor.
    """
    args, kwargs = example_call(model, example_inputs)
    parameters = list(inspect.signature(model.forward).parameters)
    named = {**dict(zip(parameters, args, strict=False)), **kwargs}
    if wrong := [n for n, v in named.items() if not isinstance(v, Tensor)]:
        raise ExportError(
            f"example input {wrong[0]!r} is a {type(named[wrong[0]]).__name__}; an ONNX graph takes tensors. "
            "Leave it out, or wrap the model"
        )
    order = {n: i for i, n in enumerate(parameters)}
    return dict(sorted(named.items(), key=lambda item: order.get(item[0], len(order))))


def auto_dynamic_shapes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Axis 0 is the batch; axis 1 of an integer or boolean matrix is the sequence."""
    result = {}
    for name, value in inputs.items():
        axes = {0: "batch"} if value.dim() else {}
        if value.dim() == 2 and not value.is_floating_point():
            axes[1] = "sequence"
        result[name] = axes
    return result


def widened(inputs: Mapping[str, Tensor], shapes: DynamicShapes) -> dict[str, Tensor]:
    """Repeat dynamic axes of length 1: an example of batch 1 would give a file that only takes batch 1."""
    result = {}
    for name, value in inputs.items():
        repeats = [2 if axis in shapes.get(name, {}) and size == 1 else 1 for axis, size in enumerate(value.shape)]
        result[name] = value.repeat(*repeats) if value.dim() else value
    return result


def resized(
    inputs: Mapping[str, Tensor],
    shapes: DynamicShapes,
    sizes: Mapping[str, int],
    seed: int,
    vocabulary: int | None,
) -> dict[str, Tensor]:
    """Fresh random inputs of other sizes: ids below the vocabulary, masks of ones, normal floats.

    Args:
        inputs: examples, for dtypes and fixed axes.
        shapes: names of the dynamic axes.
        sizes: new length of each named axis.
        seed: of the random numbers.
        vocabulary: exclusive bound of integers; the example's largest plus one where None.
    """
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, value in inputs.items():
        axes = shapes.get(name, {})
        shape = [sizes[axes[i]] if i in axes else s for i, s in enumerate(value.shape)]
        if value.is_floating_point():
            fresh = torch.randn(shape, generator=generator).to(value.dtype)
        elif "mask" in name or value.dtype == torch.bool:
            fresh = torch.ones(shape, dtype=value.dtype)
        elif name == "position_ids":
            fresh = torch.arange(shape[-1]).expand(shape).to(value.dtype).contiguous()
        else:
            bound = vocabulary if name == "input_ids" and vocabulary else int(value.max()) + 1
            fresh = torch.randint(0, bound, shape, generator=generator).to(value.dtype)
        result[name] = fresh.to(value.device)
    return result


def flat_outputs(out: Any, taken: tuple[str, ...] = ()) -> list[tuple[str, Tensor]]:
    """Tensors of a result with their names, different from each other and from those ``taken``."""
    from torch.utils import _pytree as pytree

    found = [(p, t) for p, t in pytree.tree_flatten_with_path(out)[0] if isinstance(t, Tensor)]
    used, result = set(taken), []
    for index, (path, tensor) in enumerate(found):
        name = _name(path, index)
        while name in used:
            name += "_out"
        used.add(name)
        result.append((name, tensor))
    return result


def _name(path: Any, index: int) -> str:
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
    text = "_".join(parts)
    return text if text and not text.isdigit() else f"output_{index}"
