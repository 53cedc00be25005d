"""Calls whose result needs no run on fake tensors: nearly all of a recording's time goes into those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from oftfx.formats.registry import format_of
from oftfx.placement.find import placements_on
from oftfx.trace.molds import Mold
from oftfx.trace.torch_private import CALL, FakeTensors, device_of, without_modes

_SCALARS = (type(None), bool, int, float, str, torch.dtype)
_OF_EVERY_MODULE = {*vars(nn.Module()), CALL}


class KnownShapes:
    """What layers make of fake tensors, without running them; what one made is learned for the others of its kind."""

    def __init__(self, fakes: FakeTensors | None = None) -> None:
        self._fakes = fakes
        self._learned: dict[Any, tuple[tuple[int, ...], torch.dtype, bool]] = {}
        self._molds: dict[Any, Mold] = {}

    def result(self, module: nn.Module, x: torch.Tensor, run: Callable[[], Any], *, alone: bool) -> Any:
        """What the layer makes of ``x``, or a tensor like it.

        Args:
            module: the layer.
            x: its input, fake.
            run: runs it, for where nothing else tells; in the modes that are active.
            alone: ``x`` is all that it gets.
        """
        kind = None
        with without_modes():
            if alone and is_bare_linear(module, x):  # most calls of a model
                trains = x.requires_grad or any(p.requires_grad for p in module.parameters())
                return self._like(x, (*x.shape[:-1], len(module.weight)), x.dtype, trains and torch.is_grad_enabled())
            weight_format = format_of(module)
            if weight_format is not None and not weight_format.lossless:
                # A quantized layer's own forward may rewrite its weight or lack a fake kernel.
                return x.new_empty((*x.shape[:-1], weight_format.geometry(module).out_features))
            if alone:
                kind = kind_of_call(module, x)
            if kind is not None and kind in self._learned:
                return self._like(x, *self._learned[kind])
        out = run()
        with without_modes():
            # A layer that has noted something on itself may be read for it, so each of its kind has to run.
            if kind is not None and type(out) is type(x) and kind == kind_of_call(module, x) and _is_static(out):
                self._learned[kind] = tuple(out.shape), out.dtype, out.requires_grad
        return out

    def _like(self, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, differentiable: bool) -> torch.Tensor:
        """A new one: no leaf where it has gradients, so that it can be written to."""
        if self._fakes is None or not all(type(size) is int for size in shape):  # symbolic: no key
            return x.new_empty(shape, dtype=dtype).requires_grad_(differentiable).clone()
        key = shape, dtype, differentiable, device_of(x)
        if key not in self._molds:
            self._molds[key] = Mold.shaped(shape, None, dtype, device_of(x), differentiable)
        return self._molds[key].cast(self._fakes, [x])


def is_bare_linear(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether a call is ``x @ W^T + b`` and nothing else: torch's own layer, no hook but ours, no cast on the way."""
    if type(module) is not nn.Linear or "forward" in vars(module) or module._forward_hooks:
        return False
    weight = module._parameters.get("weight")
    fits = type(weight) is nn.Parameter and weight.dtype == x.dtype and weight.shape[1:] == x.shape[-1:]
    ours = len(placements_on(module)) == len(module._forward_pre_hooks)
    return fits and ours and not _autocasts()


def kind_of_call(module: nn.Module, x: torch.Tensor) -> Any:
    """What decides the shape that a small module makes of one tensor, comparable between modules; None where unknown.

    Layers repeat: norms and activations of one class, with equal settings and parameters of equal shape, do the same to
    inputs of equal shape.
    """
    if module._modules or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return None
    own = {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE}
    if not all(map(_is_setting, own.values())) or not all(type(s) is int for s in x.shape):
        return None
    tensors = [*module._parameters.items(), *module._buffers.items()]
    held = tuple((n, None if t is None else (tuple(t.shape), t.dtype, t.requires_grad)) for n, t in tensors)
    given = tuple(x.shape), x.dtype, device_of(x), x.requires_grad, torch.is_grad_enabled(), _autocasts()
    return type(module), module.training, tuple(own.items()), held, given


def _is_static(tensor: torch.Tensor) -> bool:
    return all(type(size) is int for size in tensor.shape)


def _autocasts() -> bool:
    return any(map(torch.is_autocast_enabled, ("cpu", "cuda")))


def _is_setting(value: Any) -> bool:
    return isinstance(value, _SCALARS) or (isinstance(value, tuple) and all(map(_is_setting, value)))
