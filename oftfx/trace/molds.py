"""Fake tensors made from what is known of them: a tenth of what it takes to let torch find it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from oftfx.trace.torch_private import FakeTensors, device_of


@dataclass(frozen=True)
class Mold:
    """What makes fake tensors of one kind, each with its place in the graph of autograd.

    Attributes:
        element: a tensor without memory, of the shape, strides and dtype.
        device: where the tensors pretend to be.
        differentiable: whether gradients flow to them.
    """

    element: torch.Tensor
    device: torch.device
    differentiable: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Mold:
        """For more tensors like a fake one."""
        return cls.shaped(tuple(tensor.shape), tensor.stride(), tensor.dtype, device_of(tensor), tensor.requires_grad)

    @classmethod
    def shaped(
        cls,
        shape: tuple[int, ...],
        stride: tuple[int, ...] | None,
        dtype: torch.dtype,
        device: torch.device,
        differentiable: bool,
    ) -> Mold:
        """For tensors of known numbers; ``stride`` is that of a contiguous one where it is None."""
        with FakeTensors.none():
            like = {"dtype": dtype, "device": "meta"}
            made = torch.empty(shape, **like) if stride is None else torch.empty_strided(shape, stride, **like)
        return cls(made, device, differentiable)

    def cast(self, fakes: FakeTensors, inputs: list[torch.Tensor]) -> torch.Tensor:
        """A new tensor; no leaf where it has gradients, so that it can be written to."""
        return cast_all((self,), fakes, inputs)[0]


def cast_all(molds: tuple[Mold, ...], fakes: FakeTensors, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """New tensors, the results of one function; gradients flow to all of them or to none."""
    if molds[0].differentiable:
        return tuple(_Computed.apply(molds, fakes, *inputs))  # type: ignore[no-untyped-call]
    return tuple(fakes.new(m.element, m.device) for m in molds)


class _Computed(torch.autograd.Function):
    """Stands in the graph of autograd for a function that was not run."""

    @staticmethod
    def forward(ctx: Any, molds: tuple[Mold, ...], fakes: FakeTensors, *inputs: torch.Tensor) -> Any:
        # No tensor is saved: one that is written to later would know of this function, and both stay for ever.
        ctx.inputs = [(tuple(t.shape), t.dtype, device_of(t)) if t.requires_grad else None for t in inputs]
        return tuple(fakes.new(m.element, m.device) for m in molds)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # noqa: ARG004
        made = (i and torch.empty(i[0], dtype=i[1], device=i[2]) for i in ctx.inputs)
        return None, None, *made
