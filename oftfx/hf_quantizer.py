"""What transformers notes on a model about its quantization, kept true when rotations come and weights change."""

from __future__ import annotations

import copy
from typing import Any

import torch.nn as nn

from oftfx.formats.registry import format_of

_NOTES = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


def allow_training(model: nn.Module) -> None:
    """Let transformers' Trainer take a quantized model that has rotations to train.

    Its check knows PEFT's adapters and quantizers that train the weights themselves. The model gets a quantizer of its
    own that says the latter; only that check asks.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None or getattr(quantizer, "is_qat_trainable", True):
        return
    own = copy.copy(quantizer)
    own.__class__ = trainable_class(type(quantizer))
    model.hf_quantizer = own


def trainable_class(base: type) -> type:
    """A quantizer class that says yes; pickles name this function, so it can be made again."""
    found = _classes.get(base)
    if found is None:
        found = type(base.__name__, (base,), {"is_qat_trainable": True, "__reduce_ex__": _reduce})
        found.__module__, found.__qualname__ = base.__module__, base.__qualname__
        _classes[base] = found
    return found


_classes: dict[type, type] = {}


def _reduce(self: Any, protocol: int) -> Any:  # noqa: ARG001
    return _restored, (type(self).__mro__[1], dict(self.__dict__))


def _restored(base: type, state: dict[str, Any]) -> Any:
    result: Any = object.__new__(trainable_class(base))
    result.__dict__.update(state)
    return result


class QuantizerNotes:
    """What a model says of its quantization, to be brought back by an undo."""

    def __init__(self, model: nn.Module) -> None:
        self.notes = {n: vars(model)[n] for n in _NOTES if n in vars(model)}
        config = getattr(model, "config", None)
        self.config = copy.copy(getattr(config, "quantization_config", None))

    def restore(self, model: nn.Module) -> None:
        """Bring it back."""
        vars(model).update(self.notes)
        if self.config is not None:
            model.config.quantization_config = self.config  # type: ignore[union-attr]


def note_float_layers(model: nn.Module, made_float: list[str]) -> None:
    """After layers became float ones: a saved model must not be loaded with quantized layers in their place.

    Args:
        model: the folded model.
        made_float: paths of those layers.
    """
    config: Any = getattr(model, "config", None)
    quantization: Any = getattr(config, "quantization_config", None)
    if not made_float or quantization is None:
        return
    if not any(_is_quantized(m) for m in model.modules()):
        for name in _NOTES:
            vars(model).pop(name, None)
        del config.quantization_config
        return
    quantization = copy.copy(quantization)
    # A list of exceptions replaces transformers' own (the head), so it has to name every float layer.
    plain = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not _is_quantized(m)]
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(quantization, name):
            skipped = getattr(quantization, name) or []
            setattr(quantization, name, [*skipped, *(n for n in plain if n not in skipped)])
    config.quantization_config = quantization
    if (quantizer := vars(model).get("hf_quantizer")) is not None:
        model.hf_quantizer = copy.copy(quantizer)
        model.hf_quantizer.quantization_config = quantization  # type: ignore[union-attr, assignment]


def _is_quantized(module: nn.Module) -> bool:
    found = format_of(module)
    return found is not None and not found.lossless
