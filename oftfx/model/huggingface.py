"""What transformers notes on a model, about its quantization and its shared weights, kept true when these change."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from oftfx.formats.registry import format_named, format_of

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


_EXCEPTIONS = ("llm_int8_skip_modules", "modules_to_not_convert")


def can_except(quantization: Any) -> bool:
    """Whether a quantization config can name layers that are not quantized; see `note_float_layers`."""
    inner = getattr(quantization, "quantization_config", None)
    return hasattr(inner, "ignore") or any(hasattr(quantization, n) for n in _EXCEPTIONS)


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
        without_quantizer(model)
        return
    quantization = copy.copy(quantization)
    # A list of exceptions replaces transformers' own (the head), so it has to name every float layer.
    plain = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not _is_quantized(m)]
    for name in _EXCEPTIONS:
        if hasattr(quantization, name):
            skipped = getattr(quantization, name) or []
            setattr(quantization, name, [*skipped, *(n for n in plain if n not in skipped)])
    inner: Any = getattr(quantization, "quantization_config", None)  # compressed-tensors has its own inside
    if hasattr(inner, "ignore"):
        skipped = inner.ignore or []
        quantization.quantization_config = copy.copy(inner)
        quantization.quantization_config.ignore = [*skipped, *(n for n in plain if n not in skipped)]
    config.quantization_config = quantization
    if (quantizer := vars(model).get("hf_quantizer")) is not None:
        model.hf_quantizer = copy.copy(quantizer)
        model.hf_quantizer.quantization_config = quantization  # type: ignore[union-attr, assignment]


def without_quantizer(model: nn.Module) -> None:
    """Forget who quantized a model, which has to have a config that says so."""
    for name in _NOTES:
        vars(model).pop(name, None)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config  # type: ignore[union-attr]


def _is_quantized(module: nn.Module) -> bool:
    found = format_of(module)
    return found is not None and not found.lossless


GPTQ_VERSION_1 = "gptq"
_GPTQ_VERSION = "gptq_v2"
_OF_THE_BASE = "_oftfx_gptq_format"


def note_zeros(model: nn.Module) -> None:
    """Let the quantization config name the version of the zeros that the layers have.

    Loaders turn the zeros of a version 1 file (``zero - 1``) into those of version 2 (``zero``), which gptqmodel's
    layers compute with, and leave the config at version 1. ``save_pretrained`` would write both, and the file would be
    loaded with every zero off by one, without a word. The config becomes an object of the model's own.

    Args:
        model: any model; one without such a config or such layers is not changed.
    """
    config: Any = getattr(model, "config", None)
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization is None or not any(map(_holds_version_2, model.modules())):
        return
    quantization = copy.copy(quantization)
    said = quantization if isinstance(quantization, dict) else vars(quantization)
    vars(model)[_OF_THE_BASE] = said.get("checkpoint_format", said.get("format")) or GPTQ_VERSION_1
    if isinstance(quantization, dict):
        quantization.update(format=_GPTQ_VERSION, checkpoint_format=_GPTQ_VERSION)
    else:  # writes its format under both names
        quantization.format = _GPTQ_VERSION
    config.quantization_config = quantization
    if (quantizer := vars(model).get("hf_quantizer")) is not None:
        model.hf_quantizer = copy.copy(quantizer)
        model.hf_quantizer.quantization_config = quantization  # type: ignore[union-attr, assignment]


def zeros_of_the_base(model: nn.Module) -> str | None:
    """The version of the zeros in the files that a model came from, as `note_zeros` found it; None where it did not."""
    return vars(model).get(_OF_THE_BASE)


def _holds_version_2(module: nn.Module) -> bool:
    weight_format: Any = format_named("gptq")
    return weight_format.matches(module) and not weight_format.adds_one(module)


@dataclass(frozen=True)
class Untied:
    """What was shared before; `restore` shares it again.

    Attributes:
        tied: transformers' table of shared weights.
        ties_embeddings: the configuration's setting.
        replaced: parameters that got a copy of their own, by name.
    """

    tied: dict[str, str]
    ties_embeddings: bool | None
    replaced: dict[str, nn.Parameter]

    def restore(self, model: nn.Module) -> None:
        """Share them again."""
        model.all_tied_weights_keys = self.tied  # type: ignore[assignment]
        if self.ties_embeddings is not None:
            model.config.tie_word_embeddings = self.ties_embeddings  # type: ignore[union-attr]
        for name, parameter in self.replaced.items():
            _put(model, name, parameter)


def untie(model: nn.Module, name: str) -> Untied | None:
    """Take a parameter out of the model's table of shared weights; None where it is not in it.

    transformers has one switch for all of them, so whatever else was shared gets memory of its own as well: otherwise
    only one name of it would be saved, and the others start at random after loading.
    """
    config = getattr(model, "config", None)
    tied = getattr(model, "all_tied_weights_keys", None)
    if not isinstance(tied, dict) or not any(name in pair for pair in tied.items()):
        return None
    ties = getattr(config, "tie_word_embeddings", None)
    left = {k: v for k, v in tied.items() if name not in (k, v)}
    replaced = {}
    if ties:
        config.tie_word_embeddings = False  # type: ignore[union-attr]
        parameters = dict(model.named_parameters(remove_duplicate=False))
        kept: set[int] = set()
        for other in [n for n in parameters if n in {*tied, *tied.values()} and n != name]:
            old = parameters[other]
            if id(old) in kept:
                replaced[other] = old
                _put(model, other, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
            kept.add(id(old))
        left = {}
    model.all_tied_weights_keys = left  # type: ignore[assignment]
    return Untied(tied, ties, replaced)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = parameter
