"""Run a model in eval mode and leave it as it was."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

import torch
import torch.nn as nn

Inputs: TypeAlias = Mapping[str, Any] | tuple[Any, ...]
"""Of a model, by keyword or by position."""

_CACHES = {"use_cache", "past_key_values", "cache_params", "layer_past", "past_buckets_states", "cache", "state"}
"""What models call a cache that they are given, or that they are to return."""


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


def call_once(model: nn.Module, inputs: Inputs) -> Any:
    """Run a model that will not be asked to go on: no cache of keys and values, unless the inputs speak of one."""
    parameters = inspect.signature(model.forward).parameters
    given = set(inputs) if isinstance(inputs, Mapping) else {n for n, _ in zip(parameters, inputs, strict=False)}
    if given & _CACHES or not ("use_cache" in parameters or _hands_on(model, parameters)):
        return call(model, inputs)
    return model(**inputs, use_cache=False) if isinstance(inputs, Mapping) else model(*inputs, use_cache=False)


def _hands_on(model: nn.Module, parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a forward hands ``use_cache`` on without naming it, as some of transformers' do that take a cache."""
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return False
    # ``cache`` since transformers 5.24; but some call something else so, which knows no ``use_cache``.
    text = getattr(getattr(model, "config", None), "get_text_config", None)
    return "past_key_values" in parameters or (
        "cache" in parameters and text is not None and hasattr(text(decoder=True), "use_cache")
    )


def input_name(layer: nn.Module, kwargs: Mapping[str, Any]) -> str:
    """Under which name a layer that was called by keyword has got what it reads."""
    return "input" if "input" in kwargs else next(iter(inspect.signature(layer.forward).parameters))


def outputs_of(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """All tensors a model returns for keyword or positional inputs, in eval mode, without gradients or a cache."""
    with evaluating(model), torch.no_grad():
        out = call_once(model, inputs)
    return list(tensors_of(out))


def tensors_of(result: Any) -> Iterator[torch.Tensor]:
    """Tensors anywhere in a model's result, in order, also in objects of classes of its own (a dataclass, say)."""
    todo, seen = [result], dict[int, Any]()  # objects are kept, as ids are only unique among living ones
    while todo:
        value = todo.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif id(value) not in seen:
            seen[id(value)] = value
            todo += reversed(_parts(value))


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (tuple, list, set)):
        return list(value)
    if isinstance(value, (nn.Module, type)) or callable(value):
        return []
    if is_dataclass(value):  # which may have no __dict__
        return [getattr(value, f.name) for f in fields(value)]
    return list(vars(value).values()) if hasattr(value, "__dict__") else []
