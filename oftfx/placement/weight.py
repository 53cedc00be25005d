"""Rotate a weight where it is read: ``y = layer(x; W @ R^T)``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch.autograd.graph import saved_tensors_hooks

from oftfx.errors import OftfxError
from oftfx.model.running import input_name
from oftfx.placement.base import Placement
from oftfx.placement.calls import close_call, is_inside, open_call, prepare, restore
from oftfx.placement.rows import OPEN, rows_of
from oftfx.placement.rows_of_weight import chain_of_call, output_by_rows
from oftfx.placement.torch_private import is_compiled, never_compiled_alone, pause_dynamo, resume_dynamo
from oftfx.placement.unsaved import keep_recipes
from oftfx.rotation.caching import caching
from oftfx.rotation.frozen import FrozenRotation
from oftfx.rotation.glimpse import Glimpse
from oftfx.rotation.identity import Identity
from oftfx.rotation.module import Rotation
from oftfx.rotation.remade import remade


class RotateWeight(Placement):
    """While the reader runs, the weight's attribute is ``W @ R2^T @ R1^T``; the Parameter itself never changes.

    The pre-hook makes the rotated tensor and lends it to this call alone, `calls` says how; a hook that is always
    called ends that. So names, class and ``state_dict`` stay, and any number of threads may train and evaluate one
    layer. For convolutions, functional uses and weights of attention and experts. In eval mode without gradients the
    rotated weight is computed once, and threads share it.

    Dynamo follows the hooks: in what it traces, the tensor stands in the holder's ``__dict__`` before the Parameter of
    that name and is gone again when the reader ends, so what it compiles writes nothing there. A reader whose graph
    breaks runs without Dynamo (see `calls`), as long as rotations act.

    A thread that the reader itself starts is another thread: it reads the Parameter.

    Args:
        reader: the module in whose forward the weight is read; the holder itself where None.
    """

    kind = "weight"

    def __init__(self, *args: Any, reader: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reader = reader
        weight_format = self.weight_format()
        if weight_format is None:
            raise OftfxError(f"{self.site}: no known format reads the weight of this {type(self.module).__name__}")
        self.layout = weight_format.layout(self.module)
        self._identity = Identity()
        self._glimpse = Glimpse()
        self._cached: tuple[Any, torch.Tensor] | None = None

    @property
    def reader(self) -> nn.Module:
        """The module in whose forward the weight is read."""
        return self.module if self._reader is None else self._reader

    def register(self) -> None:
        """Around the reader's forward."""
        prepare(self, self.module, self.parameter)
        self.reader.register_forward_pre_hook(self, with_kwargs=True)
        self.reader.register_forward_hook(self.give_back, always_call=True)

    @never_compiled_alone
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Let this call read the rotated weight in the Parameter's place."""
        if torch.compiler.is_dynamo_compiling():
            weight = self.acting(module)
            if weight is not None:
                self.module.__dict__[self.parameter] = weight
            return None
        compiler, opened = pause_dynamo(), False
        try:
            weight = self.acting(module)
            if weight is not None or is_inside():  # a call inside a call may have another adapter, or none
                open_call(self, self.module, self.parameter, weight, compiler)
                opened = True
        finally:
            if not opened:
                resume_dynamo(compiler)
        if weight is None or torch.compiler.is_compiling():
            return None
        return with_right_gradient(module, args, kwargs or {})

    @never_compiled_alone
    def give_back(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The call has ended; where rows of a batch have adapters of their own, theirs are made now."""
        if torch.compiler.is_dynamo_compiling():
            self.module.__dict__.pop(self.parameter, None)
            return None
        compiler = pause_dynamo()
        opened, lent = close_call(self)
        try:
            keep_recipes(lent, args, output)
        finally:
            resume_dynamo(opened or compiler)
        rows = rows_of(self) if OPEN.any and output is not None else None
        return None if rows is None else output_by_rows(rows, self, args, output)

    def acting(self, module: nn.Module) -> torch.Tensor | None:
        """The rotated weight; None where no rotation acts now."""
        if getattr(module, "_is_replica", False):
            raise OftfxError(
                f"{self.site}: nn.DataParallel copies modules without their parameters, so this weight cannot be "
                "rotated there; use DistributedDataParallel"
            )
        self.note_run()
        rows = rows_of(self) if OPEN.any else None
        chain = self.in_effect(None if rows is None else chain_of_call(rows, self))
        if not chain:
            return None
        if "_hf_hook" in self.module.__dict__ and self.module._parameters.get(self.parameter).is_meta:  # type: ignore[union-attr]
            raise OftfxError(
                f"{self.site}: accelerate has offloaded this weight and brings it back only after its rotation; keep "
                "this layer on a device, or fold first"
            )
        if not torch.compiler.is_dynamo_compiling() and is_compiled(module.forward):
            raise OftfxError(
                f"{self.site}: the forward of {type(module).__name__} is compiled without the hooks around it, so it "
                "would read this weight unrotated; compile the module (torch.compile(module) or module.compile()), or "
                "fold first"
            )
        return self.rotated(chain)

    def recomputed(self) -> torch.Tensor | None:
        """What a checkpoint inside the reader's forward reads when backward comes to it."""
        chain = self.in_effect()
        if not chain:
            return None
        if any(isinstance(r, Rotation) and r.dropout is not None and r.training for r in chain):
            raise OftfxError(
                f"{self.site}: a checkpoint inside the forward of {type(self.reader).__name__} would drop other blocks "
                "when it is run again; put the checkpoint around the module, or set dropout=0"
            )
        with saved_tensors_hooks(_as_it_is, _as_it_is):  # the checkpoint counts what its own part saves
            return self.rotated(chain)

    def rotated(self, chain: list[Rotation | FrozenRotation]) -> torch.Tensor:
        """The weight as the reader sees it, in its own shape and dtype; the product is made in float32 at least."""
        weight: Any = self.module._parameters.get(self.parameter)
        if weight is None:
            raise OftfxError(
                f"{self.site} of this {type(self.module).__name__} is no parameter any more: something computes it "
                "(weight_norm, spectral_norm, pruning), and would not see the rotation. Take that away first "
                "(torch.nn.utils.parametrize.remove_parametrizations, prune.remove), or fold before"
            )
        states = [r.state() for r in chain]
        if None in states or not _cacheable(weight):
            return self._product(weight, chain)
        place = weight._version, weight.data_ptr(), self._glimpse.of(weight), weight.device, weight.dtype
        key = (self._identity.of(weight), *place, *states)
        cached = self._cached
        if cached is None or cached[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                cached = (key, self._product(weight, chain))
            if type(cached[1]) is torch.Tensor:  # neither fake nor functional
                self._cached = cached
        return cached[1]

    def _product(self, weight: torch.Tensor, chain: list[Rotation | FrozenRotation]) -> torch.Tensor:
        # Backward has the weight and the blocks, and no float32 copy of the weight; nor of the result, see `unsaved`.
        return remade(self._turned, weight, *(r.effective() for r in chain))

    def _turned(self, weight: torch.Tensor, *blocks: torch.Tensor) -> torch.Tensor:
        layout = self.layout
        matrix = layout.turned_by(layout.matrix(weight), list(blocks))
        rotated = layout.restore(matrix, tuple(weight.shape)).to(weight.dtype)
        # Strictly: of a weight with axes of one element, the strides alone tell its memory format.
        return rotated if rotated.stride() == weight.stride() else torch.empty_like(weight).copy_(rotated)

    def forget(self) -> None:
        """Drop the rotated weight."""
        self._cached = None
        self._identity.forget()
        self._glimpse.forget()

    def remove(self) -> None:
        """Take the hooks away, and what was computed."""
        super().remove()
        restore(self, self.module, self.parameter)
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}


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


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _cacheable(weight: torch.Tensor) -> bool:
    if not caching() or (torch.is_grad_enabled() and weight.requires_grad):
        return False
    # No plain parameter: `functional_call` has put a tensor in its place, or FSDP a shard.
    return type(weight) is nn.Parameter and not weight.is_inference()
