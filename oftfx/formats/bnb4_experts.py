"""bitsandbytes 4-bit weights of experts: parameters that ``bitsandbytes.nn.parametrize`` quantizes.

Storage: the bytes, scales and QuantState of `oftfx.formats.bnb4`, over the flattened 3-D tensor
``(experts, out, in)`` (or ``(experts, in, out)``); what reads the parameter gets it dequantized, in the dtype it had.
Bytes are the parametrization's ``original``, and a state_dict has them under the parameter's own name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList

from oftfx.errors import FormatError, MissingExtraError
from oftfx.formats.base import Geometry, WeightState
from oftfx.formats.bnb4 import flat_codes, flat_grid, packed_bytes, scale_fault
from oftfx.formats.experts import Apart, ExpertsFormat
from oftfx.formats.layout import Layout
from oftfx.formats.parametrized import parametrization_of, property_of, replace_by, restore
from oftfx.grids import Codes, Grid, Partition

_KIND = "Bnb4bitParametrization"


def four_bit_parameters(model: nn.Module) -> Iterator[str]:
    """Paths of all parameters of a model that bitsandbytes' parametrization computes."""
    for path, module in model.named_modules():
        if isinstance(module, ParametrizationList) and _is_four_bits(module):
            yield path.replace("parametrizations.", "")


def stored_codes(computes: Any) -> tuple[Grid, Codes, Tensor]:
    """Of what computes a parameter: grid, codes and values, the first two axes of the parameter as one."""
    state, shape = computes[0].quant_state, computes[0].quant_state.shape
    flat = shape[0] * shape[1], shape[2]
    grid, codes = flat_grid(flat, state, rounded=state.dtype), flat_codes(computes.original, flat, state)
    return grid, codes, grid.values(codes)


def shape_of_state(part: dict[str, Tensor]) -> tuple[int, ...]:
    """The shape of a parameter by what a state_dict has of it."""
    return tuple(_quant_state(part, torch.device("cpu")).shape)


def fill_four_bits(module: nn.Module, name: str, part: dict[str, Tensor]) -> None:
    """Give a parameter, one in 4 bits or a plain one, the bytes and scales of a state_dict.

    Args:
        module: what holds it.
        name: its name there.
        part: the bytes under the empty name, and bitsandbytes' entries of the scales.
    """
    computes: Any = parametrization_of(module, name)
    device = (module._parameters[name] if computes is None else computes.original).device
    raw = nn.Parameter(part[""].to(device), requires_grad=False)
    if computes is not None:
        computes._parameters["original"] = raw
        computes[0].quant_state = _quant_state(part, device)
        return
    try:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "bnb", "Reading 4-bit experts") from error
    module._parameters[name] = raw
    replace_parameter_4bit_prequantized(module, name, {k: v for k, v in part.items() if k}, device)


def _quant_state(part: dict[str, Tensor], device: torch.device) -> Any:
    try:
        from bitsandbytes.functional import QuantState
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "bnb", "Reading 4-bit experts") from error
    return QuantState.from_dict({k: v for k, v in part.items() if k}, device=device)


def _is_four_bits(computes: ParametrizationList) -> bool:
    first = type(computes[0]) if len(computes) else object
    return first.__name__ == _KIND and first.__module__.startswith("bitsandbytes.")


class Bnb4Experts(ExpertsFormat):
    """One parameter of a module of experts, in 4 bits.

    Not registered, as `oftfx.formats.dense.DenseParameter` is not: a `Site` knows the parameter.

    Args:
        parameter: its name in the module.
        layout: how the 3-D tensor reads as matrix.
        kind: see `oftfx.model.site.Site`.
        placements: where its rotation can act, the best first.
    """

    name = "bnb4"

    def __init__(self, parameter: str, layout: Layout, kind: str, placements: tuple[str, ...]) -> None:
        self.parameter, self._layout, self._kind, self._placements = parameter, layout, kind, placements

    def matches(self, module: nn.Module) -> bool:
        """Whether bitsandbytes' parametrization computes the parameter, before anything of ours."""
        found = parametrization_of(module, self.parameter)
        return found is not None and _is_four_bits(found)

    def refuses(self, module: nn.Module) -> str | None:
        """Shapes that the package dequantizes wrong: whoever reads the parameter gets that."""
        state = self._state(module)
        fault = scale_fault(state, self._list(module).original.device)
        if fault is None:
            return None
        return f"{fault}, as these do: rows of {state.shape[-1]}, blocks of {state.blocksize}; use a GPU"

    def layout(self, module: nn.Module) -> Layout:  # noqa: ARG002
        """As given."""
        return self._layout

    def geometry(self, module: nn.Module) -> Geometry:
        """From the QuantState, which keeps the logical shape; of one expert."""
        shape = self._shape(module)
        rows, length = self._layout.with_each(False).shape(shape)
        return Geometry(self._kind, length, rows // shape[0], self._placements, shape[0])

    def dtype(self, module: nn.Module) -> torch.dtype:
        """As which readers get it."""
        return self._state(module).dtype

    def dequantize(self, module: nn.Module) -> Tensor:
        """As readers get it, as matrix."""
        values = stored_codes(self._list(module))[2].view(self._shape(module))
        return self._layout.matrix(values).contiguous()

    def requantize(self, weight: Tensor, like: nn.Module) -> WeightState:
        """Nearest codes; with double quantization all scales are chosen anew, unless nothing has changed."""
        stored = self._layout.restore(weight.float(), self._shape(like)).flatten(0, 1).contiguous()
        grid, codes, _ = stored_codes(self._list(like))
        return self._packed(grid.nearest(stored, codes), like)

    def apart(self, module: nn.Module) -> Apart | None:
        """Where an expert, or of ``(experts, in, out)`` each of its stored rows, is whole blocks."""
        state, (experts, high, wide) = self._state(module), self._shape(module)
        size = state.blocksize
        grid, coded, _ = stored_codes(self._list(module))
        if self._layout.stored == "experts":
            if high * wide % size:
                return None
            partition, scales = Partition.flat((high, wide), size), coded.scale.view(experts, -1)
            codes = coded.codes.view(experts, high, wide)
        else:  # blocks are along the outputs
            if wide % size:
                return None
            partition = Partition.tiles((wide, high), (size, 1))
            scales = coded.scale.view(experts, high, -1).transpose(1, 2).flatten(1)
            codes = coded.codes.view(experts, high, wide).transpose(1, 2)
        one = replace(grid, partition=partition, couple=None)
        return Apart(one, [Codes(c.contiguous(), s.contiguous()) for c, s in zip(codes, scales, strict=True)])

    def together(self, coded: Sequence[Codes], like: nn.Module) -> WeightState:
        """With double quantization all scales are coupled anew, unless none has changed."""
        grid, old, _ = stored_codes(self._list(like))
        codes, scales = torch.stack([c.codes for c in coded]), torch.stack([c.scale for c in coded])
        if self._layout.stored != "experts":
            codes = codes.transpose(1, 2)
            scales = scales.unflatten(1, (-1, codes.shape[1])).transpose(1, 2)
        scale = scales.reshape(-1)
        scale, parts = (scale, old.parts) if torch.equal(scale, old.scale) else grid.stored(scale)
        return self._packed(Codes(codes.reshape(old.codes.shape), scale, parts=parts), like)

    def _packed(self, coded: Codes, like: nn.Module) -> WeightState:
        old, state = self._list(like).original, copy.copy(self._state(like))
        raw = packed_bytes(coded, state).view(old.dtype).reshape(old.shape)
        return {**self.read(like), "original": nn.Parameter(raw, requires_grad=False), "state": state}

    def as_floats(self, weight: Tensor, like: nn.Module) -> WeightState:
        """The state in which the parameter is a plain one with ``weight``."""
        stored = self._layout.restore(weight, self._shape(like)).contiguous()
        return {"plain": nn.Parameter(stored, requires_grad=False)}

    def read(self, module: nn.Module) -> WeightState:
        """What computes the parameter, and what from."""
        found = self._list(module)
        return {
            "original": found.original,
            "state": self._state(module),
            "list": found,
            "class": property_of(module, self.parameter),
        }

    def write(self, module: nn.Module, state: WeightState) -> None:
        """Either state, over either."""
        if "plain" in state:
            replace_by(module, self.parameter, state["plain"])
            return
        if parametrization_of(module, self.parameter) is None:
            restore(module, self.parameter, state["list"], state["class"])
        found = self._list(module)
        found._parameters["original"] = state["original"]
        found[0].quant_state = state["state"]

    def nbytes(self, module: nn.Module) -> int:
        """Codes and scales."""
        state = self._state(module)
        tensors = [self._list(module).original, state.absmax]
        if state.nested:
            tensors += [state.state2.absmax, state.state2.code]
        return sum(t.numel() * t.element_size() for t in tensors)

    def make_tiny(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:  # noqa: ARG002
        """A module with two experts in that parameter, in NF4."""
        try:
            from bitsandbytes.nn.parametrize import replace_parameter_4bit
        except ImportError as error:
            raise MissingExtraError("bitsandbytes", "bnb", "Making 4-bit experts") from error
        module, shape = nn.Module(), (2, out_features, in_features)
        if self._layout.stored == "experts_columns":
            shape = (2, in_features, out_features)
        module.register_parameter(self.parameter, nn.Parameter(torch.randn(shape) / in_features**0.5))
        replace_parameter_4bit(module, self.parameter)
        return module

    def _list(self, module: nn.Module) -> Any:
        found = parametrization_of(module, self.parameter)
        if found is None:
            raise FormatError(f"{self.parameter} of this {type(module).__name__} is not in 4 bits any more")
        return found

    def _state(self, module: nn.Module) -> Any:
        return self._list(module)[0].quant_state

    def _shape(self, module: nn.Module) -> tuple[int, ...]:
        return tuple(self._state(module).shape)
