"""Read the files of an adapter directory, each checked for itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oftfx.adapter import peft_files
from oftfx.adapter.peft_files import PLAN_FILE
from oftfx.errors import AdapterFileError, RuleError
from oftfx.files import remains
from oftfx.planning.peft_fields import check_fields
from oftfx.planning.plans import Plan
from oftfx.typed_json import read_object


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata.

    Raises:
        AdapterFileError: no such file, not readable, or numbers that are not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not path.is_file():
        raise AdapterFileError(no_file(path))
    try:
        data = path.read_bytes()
        tensors = load(data)
    except (SafetensorError, KeyError, OSError) as error:  # KeyError: a dtype that torch does not have
        raise AdapterFileError(f"{path} is damaged or not a safetensors file: {error}") from None
    check_finite(tensors, str(path))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__", {})


def read_config(path: Path) -> dict[str, Any]:
    """PEFT's configuration.

    Raises:
        AdapterFileError: no such file, or not of an OFT adapter.
    """
    config = read_json(path)
    kind = config.get("peft_type")
    if kind != "OFT":
        raise AdapterFileError(f"{path}: peft_type is {kind!r}, expected 'OFT'")
    check_fields(config, str(path), AdapterFileError)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        AdapterFileError: no such file, or not one.
    """
    if not path.exists():
        advice = _interrupted(path) or "it says how the numbers become a rotation"
        raise AdapterFileError(f"no file {path}; {advice}")
    return read_object(path)


def no_file(path: Path) -> str:
    """Words for weights that are not there."""
    nearby = ", ".join(sorted(p.name for p in path.parent.iterdir())) if path.parent.is_dir() else "no directory"
    advice = _interrupted(path) or "expected a directory of PEFT or save_adapter, or one safetensors file"
    if not path.parent.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path.parent)):
        advice = f"for one of the Hub, load_adapter(model, huggingface_hub.snapshot_download({str(path.parent)!r}))"
    return f"no file {path} (there: {nearby or 'nothing'}); {advice}"


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise `AdapterFileError` for numbers that are not finite."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize == 1:  # of which torch knows little
            tensor = tensor.to(torch.float32)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterFileError(
                f"{where}: {key} holds {_bad(tensor)} of {tensor.numel()} numbers that are not finite"
            )


def read_plan(path: Path) -> Plan:
    """The plan that stands beside the tensors of our own convention.

    Raises:
        AdapterFileError: it is none.
    """
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except (RuleError, OSError, UnicodeDecodeError) as error:
        raise AdapterFileError(f"{path}: {error}") from None


def _interrupted(path: Path) -> str:
    return remains(path.parent, peft_files.CONFIG_FILE, PLAN_FILE)


def _bad(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())
