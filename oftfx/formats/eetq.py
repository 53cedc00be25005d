"""EETQ: 8-bit weights, one scale a row (``transformers.integrations.eetq.EetqLinear``).

Storage: ``weight`` int8 ``(in, out)`` and ``weight_scales`` ``(out,)``, float16: ``W = (q * scale)^T``, multiplied in
the dtype of the scales. The bytes are not where their shape says: they are laid out for the tensor cores of NVIDIA
architectures 7.5 to 8.9. From ``q (in, out)``, see `processed`:

1. of every 16 rows, rows 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15, in that order;
2. transposed, so that a column is contiguous;
3. columns interleaved in pairs, 64 rows of one, then 64 rows of the other;
4. plus 128, as unsigned bytes;
5. bytes 1 and 2 of every four exchanged.

The kernel comes from a hub of compiled kernels and runs on GPUs only; the layout needs ``in`` and ``out`` divisible by
64. Newer architectures have another layout, which nothing in the layer tells apart and which is not read here.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FormatError, MissingExtraError
from oftfx.formats.base import Geometry, WeightState
from oftfx.formats.by_name import class_named
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes, Grid, Integers, Partition

_TILE = 64  # rows of a column that lie together; both sizes are multiples of it
_LEAST = 2.0**-24  # the smallest positive float16


class Eetq(ScalarFormat):
    """``EetqLinear`` with int8 weights, recognised by class name; it has no attributes but its tensors."""

    name = "eetq"

    def matches(self, module: nn.Module) -> bool:
        """Quantized: one that transformers is about to quantize still has float weights."""
        named = class_named(module, "transformers", "EetqLinear") is not None
        weight = module._parameters.get("weight") if named else None
        return weight is not None and weight.dtype == torch.int8 and weight.dim() == 2

    def geometry(self, module: nn.Module) -> Geometry:
        """From the weight, whose shape is the transposed one."""
        in_features, out_features = module._parameters["weight"].shape  # type: ignore[union-attr]
        return Geometry("linear", in_features, out_features)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """Of the scales: float16 unless the model was cast."""
        return _scales(module).dtype

    def grid(self, module: nn.Module) -> Grid:
        """Rows of -128 to 127; the largest magnitude is scaled to 128, as the package does."""
        shape = self.geometry(module)
        return _grid(shape.out_features, shape.in_features, _scales(module).dtype)

    def codes(self, module: nn.Module) -> Codes:
        """Back from the kernel's layout."""
        return Codes(unprocessed(module._parameters["weight"].data).to(torch.int16), _scales(module).float())  # type: ignore[union-attr]

    def pack(self, coded: Codes, like: nn.Module) -> WeightState:
        """In the kernel's layout, and scales in the dtype they had."""
        scales = _scales(like)
        new = coded.scale.to(scales.dtype, copy=True)
        return {
            "weight": nn.Parameter(processed(coded.codes.to(torch.int8)), requires_grad=False),
            "weight_scales": nn.Parameter(new, requires_grad=scales.requires_grad),
        }

    def read(self, module: nn.Module) -> WeightState:
        """Both Parameters."""
        return {name: module._parameters[name] for name in ("weight", "weight_scales")}

    def write(self, module: nn.Module, state: WeightState) -> None:
        """Replace both; the layer caches nothing."""
        module._parameters.update(state)

    def nbytes(self, module: nn.Module) -> int:
        """Codes and scales."""
        return sum(t.numel() * t.element_size() for t in self.read(module).values())

    def native_fault(self, module: nn.Module) -> str | None:
        """Its kernel is for GPUs; its backward knows one gradient only, that of the input."""
        if _scales(module).device.type != "cuda":
            return f"its kernel runs on GPUs only, and the layer is on {_scales(module).device.type}"
        bias = module._parameters.get("bias")
        if bias is not None and bias.requires_grad:
            return "its backward gives the bias no gradient"
        return None

    def fault_depends_on_device(self, module: nn.Module) -> bool:  # noqa: ARG002
        """Its kernel is for GPUs."""
        return True

    def forward_is_right(self, module: nn.Module) -> bool:
        """On a GPU."""
        return _scales(module).device.type == "cuda"

    def make_tiny(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """Cast to float32, as in a float32 model; both sizes have to be multiples of 64."""
        return make_eetq(nn.Linear(in_features, out_features, bias=bias)).float()


def make_eetq(linear: nn.Linear) -> nn.Module:
    """Quantize a float Linear into an ``EetqLinear`` with float16 scales and bias; ``linear`` is not changed.

    Args:
        linear: weight ``(out, in)``, both multiples of 64.

    Raises:
        FormatError: they are not.
    """
    try:
        from transformers.integrations.eetq import EetqLinear
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "Making an EETQ layer") from error
    weight = linear.weight.detach().float()
    coded = _grid(linear.out_features, linear.in_features, torch.float16).fit(weight)
    layer = EetqLinear(linear.in_features, linear.out_features, bias=linear.bias is not None).to(weight.device)
    layer.weight.data = processed(coded.codes.to(torch.int8))
    layer.weight_scales.data = coded.scale.half()
    if linear.bias is not None:
        layer.bias.data = linear.bias.detach().half()
    return layer.requires_grad_(False)


def processed(codes: Tensor) -> Tensor:
    """The bytes that the kernel reads.

    Args:
        codes: int8 ``(out, in)``.

    Returns:
        int8 ``(in, out)``, a new tensor.

    Raises:
        FormatError: a size is no multiple of 64.
    """
    out_features, in_features = codes.shape
    _check(in_features, out_features)
    columns = codes.reshape(-1, 2, 4, 2).transpose(1, 2)  # step 1: of 16, (half, pair, 2) becomes (pair, half, 2)
    pairs = columns.reshape(out_features // 2, 2, -1, _TILE).transpose(1, 2)
    return _exchanged(pairs.reshape(-1)).view(in_features, out_features)


def unprocessed(weight: Tensor) -> Tensor:
    """The codes in their order; inverse of `processed`.

    Args:
        weight: int8 ``(in, out)``, as the layer stores it.

    Returns:
        int8 ``(out, in)``, a new tensor.

    Raises:
        FormatError: a size is no multiple of 64.
    """
    in_features, out_features = weight.shape
    _check(in_features, out_features)
    pairs = _exchanged(weight.reshape(-1)).view(out_features // 2, -1, 2, _TILE)
    columns = pairs.transpose(1, 2).reshape(-1, 4, 2, 2)
    return columns.transpose(1, 2).reshape(out_features, in_features)


def _exchanged(flat: Tensor) -> Tensor:
    """Steps 4 and 5, which undo themselves: adding 128 to a byte turns its highest bit."""
    order = torch.tensor([0, 2, 1, 3], device=flat.device)
    return ((flat.view(torch.uint8) ^ 128).view(-1, 4)[:, order]).reshape(-1).view(torch.int8)


def _check(in_features: int, out_features: int) -> None:
    if in_features % _TILE or out_features % _TILE:
        raise FormatError(
            f"an EETQ weight of {in_features} inputs and {out_features} outputs: the kernel's layout needs multiples "
            f"of {_TILE}. Leave such a layer out of the quantization (modules_to_not_convert)"
        )


def _grid(out_features: int, in_features: int, scales: torch.dtype) -> Grid:
    return Grid(
        Partition.tiles((out_features, in_features), (1, in_features)),
        Integers(-128, 127, 128.0),
        product=scales,
        round_scale=lambda scale: scale.to(scales).float(),
        least_scale=_LEAST,
    )


def _scales(module: nn.Module) -> Tensor:
    return module._parameters["weight_scales"]  # type: ignore[return-value]
