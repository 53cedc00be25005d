"""What PEFT's configurations of other tuners have in common with its OFT's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from oftfx.adapter.conventions.base import Target
from oftfx.adapter.conventions.source import Source
from oftfx.adapter.peft_files import PREFIX, nearest
from oftfx.errors import AdapterError, AdapterFileError
from oftfx.planning.peft_fields import check_fields


def checked_config(source: Source, kind: str) -> Mapping[str, Any]:
    """The configuration.

    Raises:
        AdapterFileError: there is none, or it is of another tuner.
    """
    if source.config is None:
        raise AdapterFileError(f"{source.path}: no adapter_config.json beside it, which says what the numbers mean")
    if (found := source.config.get("peft_type")) != kind:
        raise AdapterFileError(f"{source.directory}: peft_type is {found!r}, the keys of the weights are of {kind}")
    check_fields(source.config, f"{source.directory}", AdapterFileError)
    # Every tuner has a word of its own for the biases of the layers that it changes.
    return {
        **source.config,
        "bias": "oft_only" if str(source.config.get("bias")).endswith("_only") else source.config.get("bias"),
    }


def by_layer(
    source: Source, target: Target, endings: Sequence[str]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """``{layer: {ending: key}}`` of keys with these endings, and ``{parameter name: key}`` of the rest.

    Raises:
        AdapterError: a layer that the model does not have.
    """
    layers: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    for key in source.heads:
        name = key.removeprefix(PREFIX)
        ending = next((e for e in endings if name.endswith(e)), None)
        if ending is None:
            others[name.replace(".base_layer.", ".")] = key
            continue
        fqn = name.removesuffix(ending)
        if fqn not in target.sites:
            raise AdapterError(
                f"{source.path}: rotates {fqn}, which is no layer of {target.model} that can be rotated. "
                f"{nearest(fqn, target.sites)}"
            )
        layers.setdefault(fqn, {})[ending] = key
    return layers, others


def read_others(source: Source, others: Mapping[str, str]) -> dict[str, Tensor]:
    """Whole parameters and buffers by name."""
    tensors = source.tensors(others.values())
    return {name: tensors[key] for name, key in others.items()}


def rows_scale(source: Source, key: str | None, out: int) -> Tensor | None:
    """A scale for each row of the weight, ``(out,)``; None where it is 1.

    Raises:
        AdapterFileError: another shape.
    """
    if key is None:
        return None
    shape = source.heads[key].shape
    if sorted(shape) != sorted((out, 1)):
        raise AdapterFileError(f"{source.named(key)} has shape {shape}, expected ({out}, 1)")
    scale = source.wide(key).reshape(-1)
    return None if bool((scale == 1).all()) else scale


def required(source: Source, keys: Mapping[str, str], ending: str, fqn: str) -> str:
    """The key of a layer with an ending.

    Raises:
        AdapterFileError: it is missing.
    """
    if ending not in keys:
        raise AdapterFileError(f"{source.path}: {fqn} has no {ending[1:]}; is the file complete?")
    return keys[ending]
