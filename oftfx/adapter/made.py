"""A model of transformers from nothing but its configuration, and the configuration it can be made from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch.nn as nn

from oftfx.errors import AdapterFileError, MissingExtraError


def write_config(model: nn.Module, directory: Path, *, without: Sequence[str] = ()) -> None:
    """``config.json`` as ``save_pretrained`` would write it, and ``generation_config.json`` where the model has one.

    Args:
        model: of transformers.
        directory: where to.
        without: entries of the configuration to leave out.
    """
    found: Any = model
    config = copy.deepcopy(found.config)
    config.dtype, config.architectures = found.dtype, [type(model).__name__]
    for name in without:
        vars(config).pop(name, None)
    if not _is_tied(found):
        config.tie_word_embeddings = False  # one of the two has been quantized
    config.save_pretrained(str(directory))
    if getattr(found, "generation_config", None) is not None:
        found.generation_config.save_pretrained(str(directory))


def made_of(directory: Path, name: str) -> nn.Module:
    """A model of the class ``name`` with weights of its own making.

    Raises:
        AdapterFileError: transformers has no such class.
        MissingExtraError: there is no transformers.
    """
    try:
        transformers = import_module("transformers")
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", f"Reading {directory}") from error
    maker = getattr(transformers, name, None)
    if maker is None:
        raise AdapterFileError(
            f"{directory}: transformers has no class {name}; make the model and pass it: "
            "oftfx.load_folded(directory, model)"
        )
    config = maker.config_class.from_pretrained(str(directory))
    made: Any = maker._from_config(config, dtype=getattr(config, "dtype", None))
    if (directory / "generation_config.json").exists():
        made.generation_config = transformers.GenerationConfig.from_pretrained(str(directory))
    return made  # type: ignore[no-any-return]


def _is_tied(model: Any) -> bool:
    here, there = model.get_input_embeddings(), model.get_output_embeddings()
    return here is None or there is None or here.weight is there.weight
