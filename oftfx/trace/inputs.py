"""Example inputs in every accepted form, and the settings a model is captured with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn as nn

from oftfx.errors import UnrecordableError
from oftfx.trace.torch_private import through_checkpoints

ExampleInputs: TypeAlias = "Mapping[str, Any] | tuple[Any, ...] | torch.Tensor | None"


def names_inputs(model: nn.Module) -> bool:
    """Whether the model has example inputs of its own (transformers' ``dummy_inputs``)."""
    try:
        return isinstance(getattr(model, "dummy_inputs", None), Mapping)
    except Exception:  # a property of somebody else's class
        return False


def example_call(model: nn.Module, example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Bring example inputs to ``(args, kwargs)``; a transformers model may leave them out.

    Raises:
        UnrecordableError: none were given and the model names none itself.
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if example_inputs is not None:
        raise UnrecordableError(
            f"example_inputs: got {type(example_inputs).__name__}, expected a dict of keyword arguments, a tuple or a "
            "tensor"
        )
    dummy = getattr(model, "dummy_inputs", None)  # transformers
    if not isinstance(dummy, Mapping):
        raise UnrecordableError(
            f"{type(model).__name__} names no example inputs of its own; pass example_inputs={{...}} or a tuple"
        )
    ids = dummy.get("input_ids")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in dummy.items()}
    if isinstance(ids, torch.Tensor):
        # transformers' own ids may exceed a small vocabulary.
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        if isinstance(vocabulary, int):
            inputs["input_ids"] = ids.to(device) % vocabulary
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    return (), inputs


_OVERRIDES: tuple[tuple[str, Any], ...] = (
    # A cache is a mutable object of its own; a graph would freeze it as a constant.
    ("use_cache", False),
    # The grouped product of expert layers has no kernel for fake float32 tensors.
    ("_experts_implementation", "batched_mm"),
    ("_experts_implementation_internal", "batched_mm"),
)


@contextmanager
def capture_settings(model: nn.Module) -> Iterator[None]:
    """Switch caches and grouped experts off in every config of the model, and back again.

    Reentrant checkpointing, whose inside no exporter sees, calls its function directly meanwhile, in this thread.
    """
    with through_checkpoints(), plain_configs(model):
        yield


@contextmanager
def plain_configs(model: nn.Module) -> Iterator[None]:
    """Switch caches and grouped experts off in every config of the model, and back again."""
    configs = {id(c): c for m in model.modules() for c in _configs(getattr(m, "config", None))}
    undo: list[tuple[Any, str, Any]] = []
    for config in configs.values():
        for name, value in _OVERRIDES:
            if name in vars(config):
                undo.append((config, name, vars(config)[name]))
                vars(config)[name] = value
    try:
        yield
    finally:
        for config, name, value in reversed(undo):
            vars(config)[name] = value


def _configs(config: Any) -> Iterator[Any]:
    if config is None or not hasattr(config, "__dict__"):
        return
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from _configs(value)
