"""How a layer stores its weight: the `WeightFormat` protocol.

A format reads and writes the weight of one kind of layer and knows what its runtime must be kept from doing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FormatError
from oftfx.formats.layout import Layout

WeightState = Mapping[str, Any]
"""The attributes of a layer that hold its weight, by name; opaque outside the format that made it."""


@dataclass(frozen=True)
class Geometry:
    """Shape of a layer's weight as matrix ``(out_features, in_features)``, and the kind of layer.

    Attributes:
        kind: ``"linear"``, ``"conv2d"``, ...; see `oftfx.model.site.Site`.
        in_features: length of the axis that is rotated; for an embedding the size of its output.
        out_features: rows.
        placements: where a rotation can act, the best first.
        experts: number of experts that the tensor holds one after another; 0 for none.

    Examples:
        >>> import torch
        >>> from oftfx.formats import format_of
        >>> layer = torch.nn.Conv2d(6, 10, 3, groups=2)
        >>> format_of(layer).geometry(layer)
        Geometry(kind='conv2d', in_features=27, out_features=10, placements=('weight',), experts=0)
    """

    kind: str
    in_features: int
    out_features: int
    placements: tuple[str, ...] = ("activation",)
    experts: int = 0


def parameter_of(module: nn.Module, name: str) -> nn.Parameter:
    """A parameter that a layer is known to have.

    Raises:
        FormatError: it has none of that name.
    """
    found = module._parameters.get(name)
    if found is None:
        raise FormatError(f"{type(module).__name__} has no parameter {name!r}")
    return found


def buffer_of(module: nn.Module, name: str) -> Tensor:
    """The same for a buffer."""
    found = module._buffers.get(name)
    if found is None:
        raise FormatError(f"{type(module).__name__} has no buffer {name!r}")
    return found


class WeightFormat(ABC):
    """One way to store a weight. Subclass, then `register_format`; the conformance suite tests it from then on.

    Attributes:
        name: the word used in plans, reports and files.
        lossless: whether `requantize` rounds to the weight's own dtype only (dense), or to a grid.

    Examples:
        >>> import torch
        >>> from oftfx.formats import WeightFormat, format_of
        >>> layer = torch.nn.Conv2d(6, 10, 3)
        >>> found = format_of(layer)
        >>> isinstance(found, WeightFormat), found.name, found.lossless
        (True, 'dense', True)
        >>> tuple(found.dequantize(layer).shape), found.nbytes(layer)
        ((10, 54), 2160)
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = False

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightFormat:
        """Itself: a format knows no layer, and layers that refer to it share it."""
        return self

    def layout(self, module: nn.Module) -> Layout:  # noqa: ARG002
        """How the stored tensor reads as matrix."""
        return Layout()

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether this format stores the weight of ``module``; by class name and tensors, importing nothing."""

    def refuses(self, module: nn.Module) -> str | None:  # noqa: ARG002
        """Why a layer that this format stores can be no site; None where it can."""
        return None

    @abstractmethod
    def geometry(self, module: nn.Module) -> Geometry:
        """Shape and kind, right for every packing."""

    @abstractmethod
    def dtype(self, module: nn.Module) -> torch.dtype:
        """The float dtype that the layer stands for, which decides the precision of its rotation and its fold."""

    @abstractmethod
    def dequantize(self, module: nn.Module) -> Tensor:
        """The weight as ``(out, in)``, float32 or wider, whatever the current packing; never a view of it."""

    def borrow(self, module: nn.Module) -> Tensor:
        """`dequantize` for who only reads it: where the weight is stored so, it is the weight."""
        return self.dequantize(module)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """``(out, in)`` of that matrix."""
        rows, columns = self.borrow(module).shape
        return rows, columns

    def rows(self, module: nn.Module) -> Iterator[tuple[slice, Tensor]]:
        """`dequantize`, some rows at a time and in order; in one go where the format has nothing better."""
        weight = self.dequantize(module)
        yield slice(0, len(weight)), weight

    @abstractmethod
    def requantize(self, weight: Tensor, like: nn.Module) -> WeightState:
        """Store ``weight (out, in)``, float32 or wider, the way ``like`` stores its own; ``like`` is not changed."""

    def take(self, weight: Tensor, like: nn.Module) -> WeightState:
        """`requantize` of a matrix that nobody else has, also one in the weight's dtype; it may become the weight."""
        return self.requantize(weight.to(torch.promote_types(weight.dtype, torch.float32)), like)

    def calibrate(self, weight: Tensor, like: nn.Module, moments: Tensor) -> WeightState:  # noqa: ARG002
        """Store ``weight (out, in)`` so that the layer's outputs change least, rather than its elements.

        Args:
            weight: float32 or wider.
            like: the layer, whose settings are kept; it is not changed.
            moments: second moments of the layer's inputs, ``X^T X (in, in)``, float32.

        Raises:
            FormatError: the format cannot do that.
        """
        raise FormatError(f"format {self.name!r} has no calibrated rounding; use 'requantize', 'keep' or 'float'")

    def native_fault(self, module: nn.Module) -> str | None:  # noqa: ARG002
        """Why gradients or outputs of the layer's own forward cannot be relied on here; None where they can.

        Such a layer computes ``x @ dequantize(layer)^T + bias`` instead; see `oftfx.formats.exact`.
        """
        return None

    def fault_depends_on_device(self, module: nn.Module) -> bool:  # noqa: ARG002
        """Whether `native_fault` may be another one on another device; a layer that is moved is then asked anew."""
        return False

    def forward_is_right(self, module: nn.Module) -> bool:  # noqa: ARG002
        """Whether `native_fault` is about gradients alone: the outputs of the layer's own forward are right here.

        On an accelerator such a layer runs its package's kernel forward and is multiplied exactly backward.
        """
        return False

    def runs(self, module: nn.Module) -> bool:  # noqa: ARG002
        """Whether the layer has a forward of its own in the state in which it is."""
        return True

    def load_state(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        """Take the weight that a layer of the same making has in its ``state_dict``."""
        module.load_state_dict(state)

    @abstractmethod
    def read(self, module: nn.Module) -> WeightState:
        """What holds the weight now, for a later `write`: references, no copies."""

    @abstractmethod
    def write(self, module: nn.Module, state: WeightState) -> None:
        """Put a state from `read` or `requantize` into ``module``."""

    @abstractmethod
    def nbytes(self, module: nn.Module) -> int:
        """Bytes of the stored weight with its scales, without bias."""

    @abstractmethod
    def make_tiny(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """A small real layer with random weights, for the conformance suite; may import its package."""

    def own(self, module: nn.Module) -> None:  # noqa: B027  (most formats have nothing to do)
        """Give a copied layer state objects of its own, over the same tensors.

        Some runtimes repack a weight in place; without this, running the original would repack its copy as well.
        """

    def hold_still(self, module: nn.Module) -> Callable[[], None]:  # noqa: ARG002
        """Forbid what a forward may do to the weight; the function returned lifts the ban again."""
        return lambda: None

    def prepare(self, module: nn.Module) -> str | None:  # noqa: ARG002
        """Make a layer's runtime keep its weight as it is, undoing what it already did.

        Returns:
            A notice for the plan where something had to be undone, else None.
        """
        return None

    def float_module(self, module: nn.Module, weight: Tensor) -> nn.Module:
        """A plain layer with ``weight (out, in)`` and the bias of ``module`` (``fold(quantized="float")``)."""
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.out_features, linear.in_features = weight.shape
        linear.weight = nn.Parameter(weight, requires_grad=False)
        bias: Tensor | None = getattr(module, "bias", None)  # a parameter, a buffer or a plain attribute
        linear.bias = None if bias is None else nn.Parameter(bias.detach().to(weight.dtype), bias.requires_grad)
        return linear.train(module.training)
