"""How a layer of compressed-tensors holds its weight, and what its scheme says about it; read by names alone."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FormatError
from oftfx.formats.base import parameter_of
from oftfx.formats.dense import FLOATS
from oftfx.formats.packing.float4_codes import from_exponents, from_nibbles, to_exponents, to_nibbles
from oftfx.formats.packing.float8_codes import from_bytes, to_bytes
from oftfx.formats.packing.words import from_stream, to_stream
from oftfx.grids import Codes, Float4, Float8, Integers, Levels, Partition

FLOAT8 = torch.float8_e4m3fn
TENSORS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale")
"""Parameters that hold a weight; which of them a layer has depends on its scheme and its state."""
Storage = Literal["words", "nibbles", "plain", "dense"]
_UNFINISHED = ("initialized", "calibration")
_TILED = ("tensor", "channel", "group", "tensor_group", "block")


def scheme_of(module: nn.Module) -> Any:
    """The scheme that the package hangs on a layer, or None."""
    scheme = vars(module).get("quantization_scheme")
    kind = type(scheme)
    named = kind.__name__ == "QuantizationScheme" and kind.__module__.startswith("compressed_tensors.")
    return scheme if named else None


def status_of(module: nn.Module) -> str:
    """``"frozen"``, ``"compressed"``, ``"decompressed"``, ...; empty where a layer has none."""
    status = vars(module).get("quantization_status")
    return str(getattr(status, "value", status or ""))


def storage_of(module: nn.Module) -> Storage:
    """Integers in words, 4-bit floats in bytes, codes as they are, or floats: the package's decompressed weight."""
    packed = module._parameters.get("weight_packed")
    if packed is not None:
        return "nibbles" if packed.dtype == torch.uint8 else "words"
    # A cast of the whole model turns float8 codes into floats; the layer is still compressed then.
    floats = parameter_of(module, "weight").dtype in FLOATS and status_of(module) != "compressed"
    return "dense" if floats else "plain"


def fault_of(module: nn.Module) -> str | None:
    """Why a layer's weight is none of those read here; None where it is."""
    scheme = scheme_of(module)
    weights = scheme.weights
    if isinstance(module, nn.Embedding):
        return "an embedding that compressed-tensors quantizes, which this version of oftfx does not rotate"
    if weights is None:
        return "its scheme of compressed-tensors rounds activations only, through which no gradient passes"
    if status_of(module) in _UNFINISHED:
        return f"compressed-tensors is still calibrating it (status {status_of(module)!r}); compress the model first"
    if weights.strategy not in _TILED:
        return f"its weight has the strategy {weights.strategy!r} of compressed-tensors, which is not known"
    if weights.type == "float" and (weights.num_bits not in (4, 8) or not weights.symmetric):
        zeros = "" if weights.symmetric else " with zero points"
        return f"floats of {weights.num_bits} bits{zeros}, which this version of oftfx does not read"
    return None


def checked(module: nn.Module) -> Any:
    """The scheme's arguments for the weight.

    Raises:
        FormatError: the weight is none of those read here.
    """
    if fault := fault_of(module):
        raise FormatError(f"a {type(module).__name__} of compressed-tensors cannot be read: {fault}")
    return scheme_of(module).weights


def shape_of(module: Any) -> tuple[int, int]:
    """``(out, in)``; the parameter ``weight_shape`` has no values on the meta device."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module.out_features, module.in_features


def rounds_activations(module: nn.Module) -> bool:
    """Whether the package's forward rounds what goes in or comes out."""
    scheme = scheme_of(module)
    asked = scheme.input_activations is not None or scheme.output_activations is not None
    return asked and vars(module).get("quantization_enabled", True)


def levels_of(module: nn.Module) -> Levels:
    """Integers as the package ranges them, or floats."""
    weights = checked(module)
    if weights.type == "float":
        return Float8(FLOAT8) if weights.num_bits == 8 else Float4(_scale(module).device)
    half = 2 ** (weights.num_bits - 1)
    return Integers(-half, half - 1, half - 0.5)


def partition_of(module: nn.Module) -> Partition:
    """Tiles of the scheme's strategy, columns in the order of ``weight_g_idx`` where there is one."""
    weights, shape = checked(module), shape_of(module)
    groups = (1, weights.group_size)
    tile = {
        "tensor": shape,
        "channel": (1, shape[1]),
        "group": groups,
        "tensor_group": groups,
        "block": tuple(weights.block_structure or ()),
    }[weights.strategy]
    partition = Partition.tiles(shape, tile, _order(module, tile[1]))
    if _scale(module).numel() != partition.groups:
        raise FormatError(
            f"Linear{shape[::-1]} has weight_scale {tuple(_scale(module).shape)}, which does not fit its strategy "
            f"{weights.strategy!r}"
        )
    return partition


def _order(module: nn.Module, size: int) -> Tensor | None:
    """Columns group by group. Versions of the package that wrote such an order marked one that is unset by -1."""
    index = module._parameters.get("weight_g_idx")
    if index is None or index.device.type == "meta" or bool((index < 0).any()):
        return None
    if storage_of(module) == "dense":
        raise FormatError(
            "a layer with weight_g_idx was decompressed, which newer versions of compressed-tensors do as if it had "
            "none; load the checkpoint again and do not run it before"
        )
    order = torch.argsort(index, stable=True)
    if not torch.equal(index[order].long(), torch.arange(len(order), device=order.device) // size):
        raise FormatError(f"weight_g_idx does not cut the {len(order)} columns into groups of {size}")
    return order


def has_zeros(module: nn.Module) -> bool:
    """Whether zero points count; a layer that is not compressed has some for symmetric weights as well, all 0."""
    return not checked(module).symmetric


def has_powers(module: nn.Module) -> bool:
    """Whether scales are powers of two, which are stored as exponents."""
    return torch.uint8 in (_scale(module).dtype, checked(module).scale_dtype)


def dtypes_of(module: nn.Module) -> tuple[torch.dtype, torch.dtype]:
    """In which the package multiplies, and to which it rounds what comes out."""
    kept, storage = _scale(module).dtype, storage_of(module)
    product = kept if kept in FLOATS else torch.bfloat16
    if "weight_global_scale" in module._parameters:
        product = torch.float32
    if storage == "dense":
        return product, parameter_of(module, "weight").dtype
    return product, torch.bfloat16 if storage == "nibbles" else product


def float8_names(module: nn.Module) -> tuple[str, ...]:
    """Parameters of a compressed layer that are float8."""
    codes = ("weight",) if storage_of(module) == "plain" and checked(module).type == "float" else ()
    return (*codes, "weight_scale") if "weight_global_scale" in module._parameters else codes


def scales_of(module: nn.Module) -> tuple[Tensor, Tensor | None, Any]:
    """Float32 scales and zeros ``(groups,)``, and the stored parts of scales that are products."""
    scale, top = _scale(module).detach(), module._parameters.get("weight_global_scale")
    values = from_exponents(scale) if scale.dtype == torch.uint8 else scale.float()
    parts = None
    if top is not None:
        values = values / top.detach().float()
        parts = (scale.to(FLOAT8), top.detach())
    return values.reshape(-1), _zeros(module), parts


def _zeros(module: nn.Module) -> Tensor | None:
    if not has_zeros(module):
        return None
    stored = parameter_of(module, "weight_zero_point").detach()
    if stored.dtype != torch.int32:  # one for all is never packed, nor is that of a plain or dense weight
        return stored.float().reshape(-1)
    bits = checked(module).num_bits
    unpacked = from_stream(stored.T.clone(memory_format=torch.contiguous_format), bits, shape_of(module)[0]).T
    return (unpacked - 2 ** (bits - 1)).float().reshape(-1)


def stored_codes(module: nn.Module) -> Tensor:
    """Codes ``(out, in)`` of a layer that is compressed."""
    storage, (_, columns) = storage_of(module), shape_of(module)
    if storage == "words":
        bits = checked(module).num_bits
        packed = parameter_of(module, "weight_packed").detach()
        return from_stream(packed, bits, columns) - 2 ** (bits - 1)
    if storage == "nibbles":
        return from_nibbles(parameter_of(module, "weight_packed").detach())
    weight = parameter_of(module, "weight").detach()
    return to_bytes(weight, FLOAT8) if checked(module).type == "float" else weight.to(torch.int16)


def packed(coded: Codes, like: nn.Module) -> dict[str, Tensor]:
    """The tensors of a compressed layer for a weight on its grid."""
    storage, bits = storage_of(like), checked(like).num_bits
    if storage == "words":
        found = {"weight_packed": to_stream(coded.codes + 2 ** (bits - 1), bits)}
    elif storage == "nibbles":
        found = {"weight_packed": to_nibbles(coded.codes)}
    else:
        old = parameter_of(like, "weight")
        floats = checked(like).type == "float"
        found = {"weight": from_bytes(coded.codes, FLOAT8, old) if floats else coded.codes.to(old.dtype)}
    return found | packed_scales(coded, like)


def packed_scales(coded: Codes, like: nn.Module) -> dict[str, Tensor]:
    """Scales and zero points in the dtypes, shapes and packing that ``like`` has them in."""
    old = _scale(like)
    if coded.parts is not None:
        stored, top = coded.parts
        found = {"weight_scale": stored.reshape(old.shape).to(old.dtype), "weight_global_scale": top}
    else:
        stored = to_exponents(coded.scale) if old.dtype == torch.uint8 else coded.scale.to(old.dtype)
        found = {"weight_scale": stored.reshape(old.shape)}
    if coded.zero is not None:
        found["weight_zero_point"] = _packed_zeros(coded.zero, like)
    return found


def _packed_zeros(zero: Tensor, like: nn.Module) -> Tensor:
    old = parameter_of(like, "weight_zero_point")
    if old.dtype != torch.int32:
        return zero.to(old.dtype).reshape(old.shape)
    bits = checked(like).num_bits
    unsigned = zero.to(torch.int16).reshape(shape_of(like)[0], -1) + 2 ** (bits - 1)
    return to_stream(unsigned.T.contiguous(), bits).T.contiguous()


def _scale(module: nn.Module) -> Tensor:
    return parameter_of(module, "weight_scale")
