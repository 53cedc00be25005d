"""Fold-aware training: a site computes with the weight that the fold will write, not with its rotation.

An `Aware` stands beside the rotations of a site, as ``<site>.oft._fold.<adapters>``, and is found through
`Placement.fold_in_effect`: while it acts, the input is not rotated, and `AwareForward` takes the place of the layer's
forward. Whatever else the layer is asked for (other adapters, none, the unfolded model) goes to the forward beneath.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from oftfx.errors import FoldError
from oftfx.formats.base import WeightFormat
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes
from oftfx.model.running import input_name
from oftfx.placement.open import Open, opened
from oftfx.rotation.accelerate import FORWARD, place_of_forward

CHILD = "_fold"
"""Name under which they stand beside a site's rotations; no adapter's name begins so."""

PAUSES = Open()
_PAUSED: ContextVar[bool] = ContextVar("oftfx_unfolded", default=False)


@contextmanager
def unfolded() -> Iterator[None]:
    """Rotations act again inside, in this thread, as if no site were fold-aware."""
    with opened(PAUSES, _PAUSED, True):
        yield


def is_paused() -> bool:
    """Whether this thread is inside `unfolded`."""
    return PAUSES.any and _PAUSED.get()


class RotatedSite(Protocol):
    """What is asked of a `Placement` here."""

    site: str
    module: nn.Module
    through: dict[tuple[str, ...], Aware]

    @property
    def child(self) -> str:
        """Name of the child that holds the site's rotations."""

    @property
    def holder(self) -> nn.Module | None:
        """That child."""

    def hold(self, name: str, rotation: nn.Module) -> None:
        """Make something a child of it."""

    def weight_format(self) -> WeightFormat | None:
        """The format that reads the weight now."""

    def fold_in_effect(self) -> Aware | None:
        """What the site computes with instead of its rotations."""

    def forget(self) -> None:
        """Drop what is kept."""


class Aware(nn.Module, ABC):
    """What the fold of some adapters will write at one site.

    Args:
        placement: of the site.
        names: the adapters, in the order in which they act there.

    Attributes:
        how: word for reports.
        format: how the layer stores its weight.
        turns: whether the rotations train through it; else they stand still while it acts.
    """

    how: ClassVar[str]
    turns: ClassVar[bool]

    def __init__(self, placement: RotatedSite, names: Sequence[str]) -> None:
        super().__init__()
        found = placement.weight_format()
        if not isinstance(found, ScalarFormat):
            raise FoldError(f"{placement.site}: its format stores no code for each weight")
        self.__dict__["placement"] = placement  # not a child
        self.format, self.names = found, tuple(names)

    @property
    def layer(self) -> nn.Module:
        """The quantized layer."""
        return self.__dict__["placement"].module

    @abstractmethod
    def coded(self, inputs: Sequence[Tensor] | None = None) -> Codes:
        """Codes, scales and zeros that a fold would write now; no gradients.

        Args:
            inputs: those of `inputs`, where they are at hand.
        """

    @abstractmethod
    def inputs(self) -> list[Tensor]:
        """The tensors that the weight depends on, in autograd's graph."""

    @abstractmethod
    def gradients(self, product: Product, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of `inputs`."""

    @abstractmethod
    def weight(self) -> Tensor:
        """The same weight as one differentiable expression, for compilers."""

    @torch.no_grad()
    def values(self, coded: Codes | None = None) -> Tensor:
        """The folded weight ``(out, in)``, float32, the format's own values to the bit."""
        return self.format.grid(self.layer).values(self.coded() if coded is None else coded)

    def forward(self, x: Tensor) -> Tensor:
        """``y = x @ W_folded^T + bias``; shape ``(..., in)`` to ``(..., out)``, in the dtype of ``x`` or autocast's."""
        bias: Tensor | None = getattr(self.layer, "bias", None)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if bias is None else bias.to(x.dtype)
        if torch.compiler.is_compiling():
            return F.linear(x, self.weight().to(x.dtype), bias)
        if not torch.is_grad_enabled():
            return F.linear(x, self.values().to(x.dtype), bias)
        return _Folded.apply(x, bias, self, *self.inputs())


@dataclass(frozen=True, eq=False)
class Product:
    """A product ``y = x @ W^T`` whose gradient is asked for; each part is computed once, if at all.

    Attributes:
        x: ``(rows, in)``.
        grad: of ``y``, ``(rows, out)``.
        values: of the weight, ``(out, in)``.
    """

    x: Tensor
    grad: Tensor
    values: Tensor

    @cached_property
    def to_x(self) -> Tensor:
        """Gradient of ``x``, ``(rows, in)``."""
        return self.grad @ self.values.to(self.grad.dtype)

    @cached_property
    def to_weight(self) -> Tensor:
        """Gradient of the weight, ``(out, in)``."""
        return (self.grad.T @ self.x.to(self.grad.dtype)).to(self.values.dtype)


class _Folded(torch.autograd.Function):
    """The product; of the weight only its codes and scales are kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, aware: Aware, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        coded = aware.coded(inputs)
        ctx.aware, ctx.parts = aware, coded.parts
        kept = (coded.codes, coded.scale) if coded.zero is None else (coded.codes, coded.scale, coded.zero)
        ctx.save_for_backward(x, *kept, *inputs)
        ctx.kept = len(kept)
        return F.linear(x, aware.values(coded).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *rest = ctx.saved_tensors
        kept, inputs = rest[: ctx.kept], rest[ctx.kept :]
        values = ctx.aware.values(Codes(kept[0], kept[1], kept[2] if ctx.kept > 2 else None, ctx.parts))
        needs_x, needs_bias, _, *needs = ctx.needs_input_grad
        product = Product(x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]), values)
        to_bias = product.grad.sum(0) if needs_bias else None
        found = list(ctx.aware.gradients(product, inputs)) if any(needs) else [None] * len(inputs)
        return product.to_x.view(x.shape) if needs_x else None, to_bias, None, *found


class AwareForward:
    """Takes the place of a layer's ``forward``.

    Attributes:
        beneath: the forward that the layer's instance had, or None for its class's.
    """

    def __init__(self, placement: RotatedSite) -> None:
        self.placement = placement
        self.beneath = placement.module.__dict__.get(place_of_forward(placement.module))
        # Whoever is called by keyword asks a forward what its first argument is called.
        self.__signature__ = inspect.signature(placement.module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The folded product while it acts, else what was there."""
        aware = self.placement.fold_in_effect()
        if aware is None:
            module = self.placement.module
            beneath = type(module).forward.__get__(module) if self.beneath is None else self.beneath
            return beneath(*args, **kwargs)
        return aware(args[0] if args else kwargs[input_name(self.placement.module, kwargs)])


class AwareSites(nn.Module):
    """Those of one site, by the names of their adapters."""

    def forward(self, *_: Any, **__: Any) -> Any:
        """Not meant to be called."""
        raise FoldError("a `_fold` child only holds what a fold will write; call the layer it belongs to")


def make_aware(placement: RotatedSite, aware: Aware) -> None:
    """Let it act whenever its adapters do."""
    placement.hold(CHILD, _others(placement))
    holder = placement.holder
    if holder is not None:
        holder._modules[CHILD].add_module("+".join(aware.names), aware.train(placement.module.training))  # type: ignore[union-attr]
    placement.through[aware.names] = aware
    module, place = placement.module, place_of_forward(placement.module)
    if not isinstance(module.__dict__.get(place), AwareForward):
        module.__dict__[place] = AwareForward(placement)
    placement.forget()


def _others(placement: RotatedSite) -> nn.Module:
    holder = placement.holder
    found = None if holder is None else holder._modules.get(CHILD)
    return AwareSites() if found is None else found


def forget_aware(placement: RotatedSite, adapter: str | None = None, exactly: tuple[str, ...] | None = None) -> None:
    """Let the rotations act again: of every adapter, where one takes part, or where exactly these act."""
    if not placement.through:
        return
    for names in [exactly] if exactly is not None else [n for n in placement.through if adapter in (None, *n)]:
        del placement.through[names]
        holder = placement.holder
        if holder is not None and (sites := holder._modules.get(CHILD)) is not None:
            sites._modules.pop("+".join(names), None)
    if placement.through:
        return
    holder = placement.holder
    if holder is not None:
        holder._modules.pop(CHILD, None)
        if not holder._modules:
            del placement.module._modules[placement.child]
    module, place = placement.module, place_of_forward(placement.module)
    instead = module.__dict__.get(place)
    if isinstance(instead, AwareForward):
        del module.__dict__[place]
        if instead.beneath is not None or place == FORWARD:  # which accelerate calls by this name
            module.__dict__[place] = instead.beneath or type(module).forward.__get__(module)
    placement.forget()
