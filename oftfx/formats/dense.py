"""Plain float weights: of linear, convolution and embedding layers, and raw parameters of any module."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from oftfx.errors import FormatError
from oftfx.formats.base import Geometry, WeightFormat, WeightState, parameter_of
from oftfx.formats.layout import Layout
from oftfx.precision import pieces

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_CONVOLUTIONS = {nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Dense(WeightFormat):
    """A float ``weight`` Parameter. Float8 and tensor subclasses are other formats.

    Linear ``(out, in)``, GPT-2's Conv1D ``(in, out)``, Conv1d to 3d ``(out, in/groups, *kernel)`` and their transposes
    ``(in, out/groups, *kernel)``, Embedding ``(num, dim)``.
    """

    name = "dense"
    lossless = True
    parameter = "weight"

    def matches(self, module: nn.Module) -> bool:
        """A layer of these kinds whose weight is a plain float Parameter, not computed by a parametrization."""
        weight: Any = module._parameters.get("weight")
        plain = type(weight) is nn.Parameter and weight.dtype in FLOATS
        return plain and kind_of(module) is not None

    def layout(self, module: nn.Module) -> Layout:
        """By the kind of layer."""
        kind = kind_of(module)
        if kind == "conv_transpose":
            return Layout("transposed", groups=module.groups)  # type: ignore[arg-type]
        if kind == "embedding":
            return Layout(side="output")
        return Layout("columns" if kind == "conv1d_gpt2" else "rows")

    def geometry(self, module: nn.Module) -> Geometry:
        """From the weight itself: attributes of subclasses are not always kept up to date."""
        rows, length = self.layout(module).shape(tuple(self._weight(module).shape))
        kind = kind_of(module)
        if kind is None:
            raise FormatError(f"a {type(module).__name__} is no layer that format 'dense' knows")
        return Geometry(kind, length, rows, placements_of(kind, module))

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The weight's own."""
        return self._weight(module).dtype

    def dequantize(self, module: nn.Module) -> Tensor:
        """The weight as matrix, widened."""
        weight = self._weight(module).detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        matrix = self.layout(module).matrix(weight).to(wide, copy=True, memory_format=torch.contiguous_format)
        limit = _max_norm(module)
        if limit is not None:  # a look-up shortens the row first
            torch.embedding_renorm_(matrix, torch.arange(len(matrix), device=matrix.device), limit, module.norm_type)  # type: ignore[arg-type]
        return matrix

    def borrow(self, module: nn.Module) -> Tensor:
        """The weight itself, if it is a wide matrix."""
        matrix = self.layout(module).matrix(self._weight(module).detach())
        wide = matrix.dtype == torch.promote_types(matrix.dtype, torch.float32)
        return matrix if wide and matrix.is_contiguous() and _max_norm(module) is None else self.dequantize(module)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """As the layout reads it."""
        return self.layout(module).shape(tuple(self._weight(module).shape))

    def rows(self, module: nn.Module) -> Iterator[tuple[slice, Tensor]]:
        """Of the weight as it is stored, widened."""
        if _max_norm(module) is not None:
            yield from super().rows(module)
            return
        matrix = self.layout(module).matrix(self._weight(module).detach())
        wide, start = torch.promote_types(matrix.dtype, torch.float32), 0
        for (part,) in pieces(matrix):
            yield slice(start, start + len(part)), part.to(wide)
            start += len(part)

    def requantize(self, weight: Tensor, like: nn.Module) -> WeightState:
        """Round once to the weight's dtype; its shape and memory format are kept."""
        old = self._weight(like)
        new = torch.empty_like(old, requires_grad=False)
        return self._state(new.copy_(self.layout(like).restore(weight, tuple(old.shape))), like)

    def take(self, weight: Tensor, like: nn.Module) -> WeightState:
        """Without a copy, if the matrix lies in memory as the weight does."""
        old = self._weight(like)
        new = self.layout(like).restore(weight, tuple(old.shape))
        alone = new.untyped_storage().nbytes() == new.numel() * new.element_size()
        same = (new.dtype, new.device, new.stride()) == (old.dtype, old.device, old.stride())
        return self._state(new, like) if alone and same else self.requantize(weight, like)

    def _state(self, new: Tensor, like: nn.Module) -> WeightState:
        old = self._weight(like)
        state: dict[str, Any] = {self.parameter: nn.Parameter(new, requires_grad=old.requires_grad)}
        if _max_norm(like) is not None:  # it is in the rows by now, and rounding must not shorten them again
            state["max_norm"] = None
        return state

    def read(self, module: nn.Module) -> WeightState:
        """The Parameter."""
        limit = _max_norm(module)
        return {self.parameter: self._weight(module), **({} if limit is None else {"max_norm": limit})}

    def write(self, module: nn.Module, state: WeightState) -> None:
        """Replace the Parameter object, so whoever shares the old one keeps it."""
        module._parameters[self.parameter] = state[self.parameter]
        if "max_norm" in state:
            module.max_norm = state["max_norm"]

    def nbytes(self, module: nn.Module) -> int:
        """Elements times their size."""
        weight = self._weight(module)
        return weight.numel() * weight.element_size()

    def make_tiny(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """A Linear."""
        return nn.Linear(in_features, out_features, bias=bias)

    def _weight(self, module: nn.Module) -> nn.Parameter:
        return parameter_of(module, self.parameter)


class DenseParameter(Dense):
    """A float Parameter that a module uses as a matrix by itself: attention, experts, ``F.linear(x, self.w)``.

    Not registered: which parameters are used so, and how, is known by a `Site`, not by the module's class.

    Args:
        parameter: its name in the module.
        layout: how it is stored.
        kind: see `oftfx.model.site.Site`.
        placements: where its rotation can act, the best first.
    """

    def __init__(
        self, parameter: str, layout: Layout, kind: str = "functional", placements: tuple[str, ...] = ("weight",)
    ) -> None:
        self.parameter, self._layout, self._kind, self._placements = parameter, layout, kind, placements

    def matches(self, module: nn.Module) -> bool:
        """Whether the module has that parameter as plain floats."""
        weight: Any = module._parameters.get(self.parameter)
        return type(weight) is nn.Parameter and weight.dtype in FLOATS

    def layout(self, module: nn.Module) -> Layout:  # noqa: ARG002
        """As given."""
        return self._layout

    def geometry(self, module: nn.Module) -> Geometry:
        """From the parameter; of experts, one expert's."""
        shape = tuple(self._weight(module).shape)
        experts = shape[0] if self._layout.stored.startswith("experts") else 0
        rows, length = self._layout.with_each(False).shape(shape)
        return Geometry(self._kind, length, rows // max(experts, 1), self._placements, experts)


def _max_norm(module: nn.Module) -> float | None:
    return module.max_norm if isinstance(module, nn.Embedding) else None


def kind_of(module: nn.Module) -> str | None:
    """The kind of layer, or None where it is none that this format knows; by class, importing nothing."""
    if isinstance(module, nn.Linear):
        # nn.MultiheadAttention reads the weight of this one and never calls it.
        return None if isinstance(module, NonDynamicallyQuantizableLinear) else "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, _TRANSPOSED):
        return "conv_transpose"
    for base, kind in _CONVOLUTIONS.items():
        if isinstance(module, base):
            return kind
    if any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__):
        return "conv1d_gpt2"
    return None


def placements_of(kind: str, module: nn.Module) -> tuple[str, ...]:
    """Where the rotation of a layer can act, the best first.

    A convolution rotates its weight: cheaper than its input in training, and free in eval mode. Where the kernel has
    one element, or is transposed, rotating the input channels is the same thing.
    """
    if kind == "embedding":
        return ("activation",)
    if kind.startswith("conv") and kind != "conv1d_gpt2":
        pointwise = kind == "conv_transpose" or math.prod(module.kernel_size) == 1  # type: ignore[arg-type]
        return ("weight", "activation") if pointwise else ("weight",)
    return ("activation", "weight")
