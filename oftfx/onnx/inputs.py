"""Inputs of an export: names, dynamic axes, and fresh examples of other shapes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
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
    found = inspect.signature(model.forward).parameters.values()
    parameters = [p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(args) > len(parameters):
        raise ExportError(
            f"{len(args)} example inputs by position, and {type(model).__name__}.forward names {len(parameters)}; an "
            "ONNX graph takes named inputs. Wrap the model in a module whose forward names them"
        )
    named = {**dict(zip(parameters, args, strict=False)), **kwargs}
    if wrong := [n for n, v in named.items() if not isinstance(v, Tensor)]:
        raise ExportError(
            f"example input {wrong[0]!r} is a {type(named[wrong[0]]).__name__}; an ONNX graph takes tensors. "
            "Leave it out, or wrap the model"
        )
    order = {n: i for i, n in enumerate(parameters)}
    return dict(sorted(named.items(), key=lambda item: order.get(item[0], len(order))))


# Inputs that are batches of their own: a model may take other numbers of texts than of images.
_BATCHES = {"pixel_values": "image_batch", "input_features": "audio_batch", "input_values": "audio_batch"}
# Float inputs with a sequence on axis 1; of others (images, spectrograms, states of an image) axis 1 is no sequence.
_SEQUENCES = ("inputs_embeds", "decoder_inputs_embeds", "encoder_hidden_states")


def auto_dynamic_shapes(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Which axes have a free length, by the names that transformers and diffusers give their inputs.

    Axis 0 is the ``batch``, where it is as long as the batch: the first input with two axes or more says how long. An
    image or audio input of another length has a batch of its own; of any other (a timestep for all) axis 0 is fixed.
    Axis 1 of integer and boolean matrices and of embeddings is the ``sequence``; that of ``decoder_...`` the
    ``decoder_sequence``, that of ``encoder_...`` the ``encoder_sequence``. A matrix of another length has a sequence of
    its own. Sizes of images and spectrograms are fixed.
    """
    batch = next((v.shape[0] for v in inputs.values() if v.dim() > 1), None)
    lengths: dict[str, int] = {}
    result: dict[str, dict[int, str]] = {}
    for name, value in inputs.items():
        axes: dict[int, str] = {}
        if value.dim() and (batch is None or value.shape[0] == batch):
            axes[0] = "batch"
        elif value.dim() and name in _BATCHES:
            axes[0] = _BATCHES[name]
        if axes and (_is_matrix(value) or (value.dim() == 3 and name in _SEQUENCES)):
            side = next((s for s in ("decoder_", "encoder_") if name.startswith(s)), "")
            sequence = f"{side}sequence"
            if lengths.setdefault(sequence, value.shape[1]) != value.shape[1]:
                sequence = f"{name}_sequence"
            axes[1] = sequence
        result[name] = axes
    return result


def _is_matrix(value: Tensor) -> bool:
    return value.dim() == 2 and not value.is_floating_point()


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
    """Fresh random inputs of other sizes: ids below the vocabulary, masks of ones but for one token, normal floats.

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
            if name.endswith("attention_mask") and len(shape) == 2 and min(shape) > 1:
                # A file that ignores the mask must not pass. At the end: no query is left without a key.
                fresh[0, -1] = 0
        elif name == "position_ids":
            fresh = torch.arange(shape[-1]).expand(shape).to(value.dtype).contiguous()
        else:
            bound = vocabulary if name.endswith("input_ids") and vocabulary else int(value.max()) + 1
            fresh = torch.randint(0, bound, shape, generator=generator).to(value.dtype)
        result[name] = fresh.to(value.device)
    return result


def flat_outputs(out: Any, taken: tuple[str, ...] = ()) -> list[tuple[str, Tensor]]:
    """Tensors of a result with their names, different from each other and from those ``taken``."""
    from torch.utils import _pytree as pytree

    found = [(p, t) for p, t in pytree.tree_flatten_with_path(_as_dicts(out))[0] if isinstance(t, Tensor)]
    used, result = set(taken), []
    for index, (path, tensor) in enumerate(found):
        name = _name(path, index)
        while name in used:
            name += "_out"
        used.add(name)
        result.append((name, tensor))
    return result


def _as_dicts(out: Any) -> Any:
    """With plain dicts in place of dataclasses and a library's own mappings, which do not tell torch their keys."""
    if isinstance(out, Mapping):
        return {n: _as_dicts(v) for n, v in out.items()}
    if is_dataclass(out) and not isinstance(out, type):
        return {f.name: _as_dicts(getattr(out, f.name)) for f in fields(out)}
    if type(out) in (tuple, list):
        return [_as_dicts(v) for v in out]
    return out


def _name(path: Any, index: int) -> str:
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
    text = "_".join(parts)
    return text if text and not text.isdigit() else f"output_{index}"
