"""Models with parameters in 4 bits: a state_dict that is read here, for transformers' loader knows none of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor

from oftfx.adapter.checkpoints import Facts, Plain, Transformers, quantized_layers
from oftfx.adapter.made import made_of, write_config
from oftfx.errors import AdapterFileError
from oftfx.folding.report import FoldReport
from oftfx.formats.bnb4_experts import fill_four_bits, four_bit_parameters, shape_of_state
from oftfx.formats.parametrized import parametrization_of, replace_by


class FourBitState(Plain):
    """Experts that bitsandbytes' parametrization quantizes, as its hooks put them into a ``state_dict``.

    A model of transformers has its configuration beside them, and is made from it where no other layer is quantized.
    """

    name: ClassVar[str] = "state_dict with 4-bit parameters"

    @classmethod
    def takes(cls, model: nn.Module) -> bool:
        """Whether it has such parameters."""
        return any(four_bit_parameters(model))

    def write(self, model: nn.Module, report: FoldReport, directory: Path) -> Facts:
        """``model.safetensors``, and ``config.json`` of a model that has a configuration."""
        facts = super().write(model, report, directory)
        if Transformers.takes(model):
            write_config(model, directory)
        made_here = Transformers.takes(model) and not quantized_layers(model)
        return {**facts, "four_bits": [*four_bit_parameters(model)], "config": made_here}

    def read(self, directory: Path, facts: Facts, model: nn.Module | None, options: dict[str, Any]) -> nn.Module:
        """Fill ``model``, whose experts may be in 4 bits or floats; without one it is made from the configuration."""
        if model is None and facts["config"] and not options:
            model = made_of(directory, facts["class"]).eval()
        return super().read(directory, facts, model, options)

    def _apart(self, facts: Facts, model: nn.Module) -> tuple[str, ...]:
        """Paths that `_fill` takes."""
        return tuple(dict.fromkeys([*facts["four_bits"], *four_bit_parameters(model)]))

    def _fill(self, model: nn.Module, parts: Mapping[str, dict[str, Tensor]], facts: Facts, directory: Path) -> None:
        for path, part in parts.items():
            parent, _, name = path.rpartition(".")
            try:
                module = model.get_submodule(parent)
                if path in facts["four_bits"]:
                    fill_four_bits(module, name, part)
                elif parametrization_of(module, name) is not None:  # became floats
                    replace_by(module, name, nn.Parameter(part[""], requires_grad=False))
            except (KeyError, AttributeError) as error:
                raise _unlike(directory, path, model) from error

    def _check_apart(
        self, model: nn.Module, parts: Mapping[str, dict[str, Tensor]], facts: Facts, directory: Path
    ) -> None:
        """Shapes of these parameters, before anything changes."""
        for path, part in parts.items():
            parent, _, name = path.rpartition(".")
            module = dict(model.named_modules()).get(parent)
            here = None if module is None else _shape(module, name)
            there = shape_of_state(part) if path in facts["four_bits"] else tuple(part[""].shape)
            if here is None:
                raise _unlike(directory, path, model)
            if here != there:
                raise AdapterFileError(f"{directory}: {path} is {there} in the file, {here} in the model")


def _shape(module: nn.Module, name: str) -> tuple[int, ...] | None:
    computes: Any = parametrization_of(module, name)
    if computes is not None:
        return tuple(computes[0].quant_state.shape)
    plain = module._parameters.get(name)
    return None if plain is None else tuple(plain.shape)


def _unlike(directory: Path, path: str, model: nn.Module) -> AdapterFileError:
    return AdapterFileError(f"{directory}: {type(model).__name__} has no parameter {path}; is it another model?")
