"""compressed-tensors: what llm-compressor writes, vLLM serves and transformers loads.

The layer stays an ``nn.Linear`` that carries a scheme, and is compressed or not. Compressed it holds codes:

* ``pack-quantized``: ``weight_packed`` int32, a bit stream along the input, codes counted from the smallest;
  zero points, where there are any, the same along the output;
* ``int-quantized``, ``float-quantized``, ``naive-quantized``: ``weight`` int8 or float8_e4m3fn itself;
* ``nvfp4-pack-quantized``, ``mxfp4-pack-quantized``: ``weight_packed`` uint8, two 4-bit floats a byte, the first in
  the low bits; ``weight_scale`` float8_e4m3fn to be divided by ``weight_global_scale``, or bare exponents in uint8.

``W = (code - zero) * scale``, multiplied in the dtype of the scales; 4-bit floats give a bfloat16 weight.

Such a layer has no forward. The model has a hook that decompresses all of it for good at the first one (see
`oftfx.model.compressed`); then ``weight`` is ``W`` in floats, four times as large, and scales and zeros stay. A frozen
layer holds a float weight that its forward rounds anew each time. Where the scheme also rounds activations, the
layer's own forward does so under ``no_grad``: no gradient passes. A rotation acts in front of that rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FormatError, MissingExtraError
from oftfx.formats.base import Geometry, WeightState, parameter_of
from oftfx.formats.dense import FLOATS, kind_of
from oftfx.formats.packing import compressed_layers as layers
from oftfx.formats.packing.float4_codes import stored_power
from oftfx.formats.packing.float8_codes import to_bytes
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes, Grid
from oftfx.precision import pieces

_TOP = torch.finfo(layers.FLOAT8).max
_LEAST = 2.0**-9  # float8's smallest
_OVER, _UNDER = 1.1, 1 / 64


class CompressedTensors(ScalarFormat):
    """A Linear with a scheme of compressed-tensors, whether compressed or not; recognised by the scheme's class."""

    name = "compressed_tensors"

    def matches(self, module: nn.Module) -> bool:
        """With a scheme; also those that `refuses` then names."""
        return layers.scheme_of(module) is not None and kind_of(module) in ("linear", "embedding")

    def refuses(self, module: nn.Module) -> str | None:
        """Embeddings, layers that are still calibrated, and number formats that are not known."""
        return layers.fault_of(module)

    def geometry(self, module: nn.Module) -> Geometry:
        """From the layer's attributes: words are padded, and some states have no ``weight``."""
        out_features, in_features = layers.shape_of(module)
        return Geometry(kind_of(module) or "", in_features, out_features)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """Of a decompressed weight; else of the scales, or of the bias where these are no plain floats."""
        candidates = (module._parameters.get(n) for n in ("weight", "weight_scale", "bias"))
        return next((t.dtype for t in candidates if t is not None and t.dtype in FLOATS), torch.bfloat16)

    def grid(self, module: nn.Module) -> Grid:
        """Tiles of integers or small floats."""
        levels = layers.levels_of(module)
        kept, (product, rounded) = parameter_of(module, "weight_scale").dtype, layers.dtypes_of(module)
        top = module._parameters.get("weight_global_scale")
        return Grid(
            layers.partition_of(module),
            levels,
            "integer" if layers.has_zeros(module) else 0.0,
            product=product,
            rounded=rounded,
            round_scale=stored_power if layers.has_powers(module) else _rounding(kept),
            couple=None if top is None else _under(top),
            least_scale=2.0**-24 if kept == torch.float16 else 1e-8,
        )

    def rows(self, module: nn.Module) -> Iterator[tuple[slice, Tensor]]:
        """Of a decompressed layer its weight as it is."""
        layers.checked(module)
        if layers.storage_of(module) != "dense" or layers.status_of(module) == "frozen":
            yield from super().rows(module)
            return
        start = 0
        for (part,) in pieces(parameter_of(module, "weight").detach()):
            yield slice(start, start + len(part)), part.to(torch.float32, copy=True)
            start += len(part)

    def codes(self, module: nn.Module) -> Codes:
        """Unpacked; of a float weight those that it is rounded to, or was."""
        scale, zero, parts = layers.scales_of(module)
        if layers.storage_of(module) != "dense":
            return Codes(layers.stored_codes(module), scale, zero, parts)
        grid, weight = self.grid(module), parameter_of(module, "weight").detach()
        if layers.status_of(module) == "frozen":  # rounded as its forward does it, in its dtypes
            level = weight / grid.partition.expand(scale).to(grid.product)
            if zero is not None:
                level += grid.partition.expand(zero).to(weight.dtype)
            return Codes(grid.levels.encode(level.float()), scale, zero, parts)
        coded = replace(grid.encode(weight.float(), scale, zero), parts=parts)
        if not torch.equal(grid.values(coded).to(weight.dtype), weight):
            raise FormatError(
                f"Linear{tuple(weight.shape)[::-1]}: its weight was decompressed and has changed since then, or was "
                "cast, so it no longer has the values that its scales allow; load the checkpoint again"
            )
        return coded

    def pack(self, coded: Codes, like: nn.Module) -> WeightState:
        """Parameters in the state that ``like`` is in; a frozen weight is given as the values it is rounded to."""
        if layers.storage_of(like) != "dense":
            return self._state(layers.packed(coded, like), like, vars(like)["quantization_status"])
        weight = self.grid(like).values(coded).to(parameter_of(like, "weight").dtype)
        return self._state({"weight": weight} | layers.packed_scales(coded, like), like, _decompressed(like))

    def _state(self, tensors: dict[str, Tensor], like: nn.Module, status: Any) -> WeightState:
        made = {n: nn.Parameter(t.contiguous(), requires_grad=False) for n, t in tensors.items()}
        return {**self.read(like), **made, "status": status}

    def native_fault(self, module: nn.Module) -> str | None:
        """Compressed, or with rounded activations."""
        rounds = "compressed-tensors rounds activations without letting gradients pass, which is left out"
        faults = [rounds] if layers.rounds_activations(module) else []
        if layers.storage_of(module) != "dense":
            faults.insert(0, "compressed-tensors has no forward for a compressed weight")
        return "; ".join(faults) or None

    def runs(self, module: nn.Module) -> bool:
        """Unless it is compressed."""
        return layers.storage_of(module) == "dense"

    def read(self, module: nn.Module) -> WeightState:
        """The parameters there are, and the state they say."""
        found = {n: module._parameters[n] for n in layers.TENSORS if n in module._parameters}
        return {**found, "status": vars(module)["quantization_status"]}

    def write(self, module: nn.Module, state: WeightState) -> None:
        """Replace all: another state has other parameters."""
        found = dict(state)
        vars(module)["quantization_status"] = found.pop("status")
        for name in layers.TENSORS:
            module._parameters.pop(name, None)
        module._parameters.update(found)

    def nbytes(self, module: nn.Module) -> int:
        """Codes or floats, scales and zeros."""
        tensors = (module._parameters.get(n) for n in layers.TENSORS)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def prepare(self, module: nn.Module) -> str | None:
        """Let a frozen weight be its rounded values, and undo a cast of float8."""
        if layers.storage_of(module) == "dense":
            if layers.status_of(module) != "frozen":
                return None
            self.write(module, self.pack(self.codes(module), module))
            return "its forward rounded its weight anew each time; the weight now holds the rounded values"
        cast = [n for n in layers.float8_names(module) if module._parameters[n].dtype in FLOATS]  # type: ignore[union-attr]
        for name in cast:
            codes = to_bytes(parameter_of(module, name), layers.FLOAT8).view(layers.FLOAT8)
            module._parameters[name] = nn.Parameter(codes, requires_grad=False)
        return f"its float8 {' and '.join(cast)} had been cast; undone" if cast else None

    def make_tiny(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """Four bits with zero points, in groups."""
        size = next(s for s in (32, 16, 11, 8, 5, 3, 2, 1) if in_features % s == 0)
        return make_compressed(
            nn.Linear(in_features, out_features, bias=bias), num_bits=4, group_size=size, symmetric=False
        )


def make_compressed(linear: nn.Linear, *, inputs: Any = None, compress: bool = True, **weights: Any) -> nn.Module:
    """Quantize a float Linear by compressed-tensors, scales by the range of each group; ``linear`` is not changed.

    Args:
        linear: weight ``(out, in)``.
        inputs: the scheme's ``QuantizationArgs`` for activations, or None.
        compress: otherwise the layer stays frozen.
        **weights: those for the weight: ``num_bits``, ``group_size``, ...
    """
    try:
        from compressed_tensors import quantization as package
        from compressed_tensors.compressors import compress_module
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    except ImportError as error:
        raise MissingExtraError("compressed_tensors", "compressed-tensors", "Making a compressed layer") from error
    layer: Any = copy.deepcopy(linear).requires_grad_(False)
    asked = package.QuantizationArgs(**weights)
    scheme = package.QuantizationScheme(targets=["Linear"], weights=asked, input_activations=inputs)
    package.initialize_module_for_quantization(layer, scheme)
    layer.quantization_status = package.QuantizationStatus.FROZEN
    weight = linear.weight.detach()
    tiles = layers.partition_of(layer).split(weight)
    top = None
    if "weight_global_scale" in layer._parameters:
        top = generate_gparam(weight.min(), weight.max())
        layer.weight_global_scale.data.copy_(top)
    scale, zero = calculate_qparams(tiles.amin(1), tiles.amax(1), asked, global_scale=top)
    layer.weight_scale.data.copy_(scale.view_as(layer.weight_scale))
    layer.weight_zero_point.data.copy_(zero.view_as(layer.weight_zero_point))
    if compress:
        compress_module(layer)
    return layer


def _decompressed(module: nn.Module) -> Any:
    status: Any = vars(module)["quantization_status"]
    return type(status)("decompressed")


def _rounding(kept: torch.dtype) -> Callable[[Tensor], Tensor]:
    largest = torch.finfo(kept).max if kept in FLOATS else None
    return lambda scale: scale.clamp(max=largest).to(kept).float()


def _under(top: Tensor) -> Callable[[Tensor], tuple[Tensor, Any]]:
    """Scales as float8 quotients of one number for all of them, which is kept if it fits what they are now.

    Servers join layers that read the same input and take one number for all; writers give such layers the same, and a
    number of its own would make the joined weight wrong there. So a few groups may rather lose a little at their end.
    """
    kept = top.detach().float()

    def stored(scale: Tensor) -> tuple[Tensor, Any]:
        share = float(scale.max() * kept / _TOP)
        divisor = kept if _UNDER <= share <= _OVER else (_TOP / scale.max()).reshape(kept.shape)
        codes = (scale * divisor).clamp(_LEAST, _TOP).to(layers.FLOAT8)
        return codes.float() / divisor, (codes, divisor)

    return stored
