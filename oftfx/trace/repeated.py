"""Functions that were run before on tensors of the same kind: their results are known.

A model repeats its layers, and all but the first few per cent of a recording on fake tensors would find out again what
was found out before.
"""

from __future__ import annotations

from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, WrapperDescriptorType
from typing import Any

import torch

from oftfx.trace.foreign import foreign
from oftfx.trace.functions import DATA_DEPENDENT
from oftfx.trace.molds import Mold, cast_all
from oftfx.trace.shared import writes
from oftfx.trace.torch_private import FakeTensors, kernels_allowed

_COMPILED = (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType)
_IN_PYTHON = frozenset(["torch.nn.functional", "torch.functional", "torch._tensor"])
_SCALARS = frozenset([int, float, bool, complex, str, torch.dtype, torch.device, torch.memory_format, torch.layout])
_DEVICES = ("cpu", "cuda")
_OTHERS = frozenset(["as_strided", "set_", "backward", "register_hook", "requires_grad_", "retain_grad"])


class Repeated:
    """Runs torch functions on fake tensors, each kind of call once.

    Known is a function of torch's own that computes, from fake tensors alone, new ones. What the model defines, what
    reads a parameter, writes, or depends on numbers runs every time.

    Args:
        fakes: makes the tensors.
    """

    def __init__(self, fakes: FakeTensors) -> None:
        self._fakes = fakes
        self._known: dict[Any, tuple[type, tuple[Mold, ...]]] = {}

    def result(self, function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``function`` gives."""
        inputs: list[torch.Tensor] = []
        kind = self._kind(function, name, args, kwargs, inputs)
        if kind is None:
            return foreign(function, *args, **kwargs)
        found = self._known.get(kind)
        if found is not None:
            container, molds = found
            made = cast_all(molds, self._fakes, inputs)
            return made[0] if container is torch.Tensor else container(made)
        out = foreign(function, *args, **kwargs)
        self._learn(kind, out, inputs)
        return out

    def _kind(
        self,
        function: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[torch.Tensor],
    ) -> Any:
        """What decides the shapes that a call gives, comparable between calls; None where that is not known."""
        own = isinstance(function, _COMPILED) or (
            isinstance(function, FunctionType) and function.__module__ in _IN_PYTHON
        )
        if not own or name in DATA_DEPENDENT or name in _OTHERS or writes(name) or kwargs.keys() & {"out", "inplace"}:
            return None
        try:
            given = self._described(args, inputs), self._described(kwargs, inputs) if kwargs else ()
        except _UnknownError:
            return None
        return (function, given, _state()) if inputs else None

    def _described(self, value: Any, inputs: list[torch.Tensor]) -> Any:
        kind = type(value)
        if kind is self._fakes.kind:
            if not self._fakes.plain(value):
                raise _UnknownError
            inputs.append(value)
            return tuple(value.shape), value.stride(), value.dtype, value.fake_device, value.requires_grad
        if value is None or value is Ellipsis:
            return value
        if kind in _SCALARS:
            return kind, value
        if kind in (tuple, list, torch.Size):
            return kind, *[self._described(v, inputs) for v in value]
        if kind is dict:
            return tuple((k, self._described(v, inputs)) for k, v in value.items())
        if kind is slice:
            return kind, *[self._described(v, inputs) for v in (value.start, value.stop, value.step)]
        raise _UnknownError

    def _learn(self, kind: Any, out: Any, inputs: list[torch.Tensor]) -> None:
        container = torch.Tensor if isinstance(out, torch.Tensor) else type(out)
        parts = (out,) if container is torch.Tensor else out
        if container not in (torch.Tensor, tuple, list) or not parts:
            return
        new = all(type(p) is self._fakes.kind and self._fakes.plain(p) for p in parts)
        # What a function gives back of its arguments is the same object, and stays so.
        if not new or any(p is i for p in parts for i in inputs) or len({p.requires_grad for p in parts}) > 1:
            return
        if parts[0].requires_grad and parts[0].is_leaf:
            return
        self._known[kind] = container, tuple(map(Mold.of, parts))


class _UnknownError(Exception):
    """An argument that says too little of itself."""


def _state() -> tuple[Any, ...]:
    """What besides its arguments decides what a function gives."""
    casts = tuple(torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in _DEVICES)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        casts,
        kernels_allowed(),
    )
