"""Rotate a weight where it is read: ``y = layer(x; W @ R^T)``."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn as nn

from oftfx.errors import OftfxError
from oftfx.model.running import input_name
from oftfx.placement.base import Placement
from oftfx.rotation.caching import caching
from oftfx.rotation.identity import Identity
from oftfx.rotation.module import FrozenRotation, Rotation

_LOCK = threading.Lock()
_LOCAL = threading.local()


def _inside() -> list[tuple[RotateWeight, bool]]:
    """The readers that this thread is in, and whether each has a rotated weight."""
    if not hasattr(_LOCAL, "stack"):
        _LOCAL.stack = []
    return _LOCAL.stack


class RotateWeight(Placement):
    """While the reader runs, the weight's attribute holds ``W @ R2^T @ R1^T``; the Parameter itself never changes.

    The pre-hook puts the rotated tensor into the holder's ``__dict__``, where Python finds it before the Parameter of
    that name; a hook that is always called takes it away. So names, class and ``state_dict`` stay, and
    ``torch.compile`` and ``torch.export`` follow. For convolutions, functional uses and weights of attention and
    experts. In eval mode without gradients the rotated weight is computed once.

    Args:
        reader: the module in whose forward the weight is read; the holder itself where None.
    """

    kind = "weight"

    def __init__(self, *args: Any, reader: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reader = reader
        weight_format = self.weight_format()
        assert weight_format is not None
        self.layout = weight_format.layout(self.module)
        self._entered = 0
        self._identity = Identity()
        self._cached: tuple[Any, torch.Tensor] | None = None

    @property
    def reader(self) -> nn.Module:
        """The module in whose forward the weight is read."""
        return self.module if self._reader is None else self._reader

    def register(self) -> None:
        """Around the reader's forward."""
        self.reader.register_forward_pre_hook(self, with_kwargs=True)
        self.reader.register_forward_hook(self.give_back, always_call=True)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Put the rotated weight in the Parameter's place."""
        if getattr(module, "_is_replica", False):
            raise OftfxError(
                f"{self.site}: nn.DataParallel copies modules without their parameters, so this weight cannot be "
                "rotated there; use DistributedDataParallel"
            )
        self.note_run()
        chain = self.in_effect()
        if chain and hasattr(self.module, "_hf_hook") and self.module._parameters[self.parameter].is_meta:  # type: ignore[union-attr]
            raise OftfxError(
                f"{self.site}: accelerate has offloaded this weight and brings it back only after its rotation; keep "
                "this layer on a device, or fold first"
            )
        weight = self.rotated(chain) if chain else None
        if torch.compiler.is_compiling():
            if weight is not None:
                self.module.__dict__[self.parameter] = weight
            return None
        with _LOCK:  # several threads may be in the reader at once
            _inside().append((self, weight is not None))
            if weight is not None:
                self._entered += 1
                self.module.__dict__[self.parameter] = weight
        return None if weight is None else with_right_gradient(module, args, kwargs or {})

    def give_back(self, module: nn.Module, args: Any, output: Any) -> None:
        """Uncover the Parameter, once no thread needs the rotated weight any more."""
        if torch.compiler.is_compiling():
            self.module.__dict__.pop(self.parameter, None)
            return
        with _LOCK:
            stack = _inside()
            # A reader may have several weights, whose hooks leave in the order in which they came.
            mine = next((i for i in reversed(range(len(stack))) if stack[i][0] is self), None)
            if mine is None:
                return  # the pre-hook itself has failed
            if stack.pop(mine)[1]:
                self._entered -= 1
            if self._entered == 0:
                self.module.__dict__.pop(self.parameter, None)

    def rotated(self, chain: list[Rotation | FrozenRotation]) -> torch.Tensor:
        """The weight as the reader sees it, in its own shape and dtype; the product is made in float32 at least."""
        weight: Any = self.module._parameters[self.parameter]
        states = [r.state() for r in chain]
        if None in states or not _cacheable(weight):
            return self._product(weight, chain)
        key = (self._identity.of(weight), weight._version, weight.data_ptr(), weight.device, weight.dtype, *states)
        cached = self._cached
        if cached is None or cached[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                cached = (key, self._product(weight, chain))
            if type(cached[1]) is torch.Tensor:  # neither fake nor functional
                self._cached = cached
        return cached[1]

    def _product(self, weight: torch.Tensor, chain: list[Rotation | FrozenRotation]) -> torch.Tensor:
        layout = self.layout
        matrix = layout.turned_by(layout.matrix(weight), [r.effective() for r in chain])
        rotated = layout.restore(matrix, tuple(weight.shape)).to(weight.dtype)
        # Strictly: of a weight with axes of one element, the strides alone tell its memory format.
        return rotated if rotated.stride() == weight.stride() else torch.empty_like(weight).copy_(rotated)

    def forget(self) -> None:
        """Drop the rotated weight."""
        self._cached = None

    def remove(self) -> None:
        """Take the hooks away, and what was computed."""
        super().remove()
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None, "_entered": 0}


def with_right_gradient(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Inputs from which torch computes the right gradient of a weight; None where those given are such.

    Of a grouped `nn.Conv2d` whose weight and input are in channels_last, torch (2.13, on a CPU) computes a wrong one if
    the input has no batch axis. A contiguous input gives the same output, bit for bit, and the right gradient.
    """
    if not (isinstance(module, nn.Conv2d) and module.groups > 1 and torch.is_grad_enabled()):
        return None
    name = None if args else input_name(module, kwargs)
    x = args[0] if name is None else kwargs[name]
    if x.dim() != 3 or x.is_contiguous():
        return None
    return ((x.contiguous(), *args[1:]), kwargs) if name is None else (args, {**kwargs, name: x.contiguous()})


def _cacheable(weight: torch.Tensor) -> bool:
    if not caching() or (torch.is_grad_enabled() and weight.requires_grad):
        return False
    # No plain parameter: `functional_call` has put a tensor in its place, or FSDP a shard.
    return type(weight) is nn.Parameter and not weight.is_inference()
