"""Models of transformers with layers of optimum-quanto: in the files of that package, for transformers writes none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import torch.nn as nn

from oftfx.adapter.checkpoints import Facts, Plain, Transformers, quantized_layers
from oftfx.adapter.made import made_of, write_config
from oftfx.errors import AdapterFileError, MissingExtraError
from oftfx.folding.report import FoldReport
from oftfx.formats.registry import format_of
from oftfx.typed_json import made, read_object

_MAP = "quanto_qmap.json"


class QuantoState(Plain):
    """``model.safetensors``, ``config.json`` and ``quanto_qmap.json``.

    ``optimum.quanto.QuantizedModelForCausalLM.from_pretrained`` reads them as well.
    """

    name: ClassVar[str] = "optimum-quanto"

    @classmethod
    def takes(cls, model: nn.Module) -> bool:
        """A model of transformers with such a layer."""
        if not Transformers.takes(model):
            return False
        found = (format_of(layer) for layer in quantized_layers(model).values())
        return any(f is not None and f.name == "quanto" for f in found)

    def write(self, model: nn.Module, report: FoldReport, directory: Path) -> Facts:
        """The three files; the configuration does not name the quantizer, for transformers would quantize again."""
        from optimum.quanto import quantization_map

        facts = super().write(model, report, directory)
        write_config(model, directory, without=("quantization_config",))
        (directory / _MAP).write_text(json.dumps(quantization_map(model), indent=4))
        return facts

    def read(self, directory: Path, facts: Facts, model: nn.Module | None, options: dict[str, Any]) -> nn.Module:
        """Make the model from its configuration, give it the layers of the map, and fill all of it."""
        from safetensors.torch import load_file

        if model is not None:
            return super().read(directory, facts, model, options)
        if options:
            raise AdapterFileError(
                f"{directory} is in the files of optimum-quanto, which are read as they are: no "
                f"{next(iter(options))}=; move the model afterwards"
            )
        try:
            from optimum.quanto import requantize
        except ImportError as error:
            raise MissingExtraError("optimum.quanto", "quanto", f"Reading {directory}") from error
        model = made_of(directory, facts["class"]).eval()
        requantize(model, load_file(directory / self._FILE), _read_map(directory / _MAP, model))
        tie: Any = model.tie_weights
        tie()  # the package has made every parameter anew
        return super().read(directory, facts, model, {})


def _read_map(file: Path, model: nn.Module) -> dict[str, dict[str, str]]:
    """How each layer is quantized, in the package's words.

    Raises:
        AdapterFileError: there is no such file, or it does not say that of layers of this model.
    """
    from optimum.quanto.tensor.qtype import qtypes

    try:
        found = made(dict[str, dict[str, str]], read_object(file))
        for path, kinds in found.items():
            model.get_submodule(path)
            for what in ("weights", "activations"):
                if kinds.get(what) not in ("none", *qtypes):
                    raise ValueError(f"{path}.{what} is {kinds.get(what)!r}, expected one of none, {', '.join(qtypes)}")
    except (ValueError, AttributeError) as error:
        raise AdapterFileError(f"{file} is damaged: {error}; save the fold again") from None
    return found
