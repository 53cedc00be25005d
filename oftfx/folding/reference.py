"""The float weights a quantized model once had: of a model, a checkpoint directory, or a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FoldError
from oftfx.files import is_name
from oftfx.formats.registry import format_of
from oftfx.typed_json import made, parsed

Reference: TypeAlias = nn.Module | str | Path | Callable[[str], Tensor]


class ReferenceWeights:
    """Original float weights by module path.

    Args:
        source: the float model; a directory of safetensors files (as `save_pretrained` writes it, sharded or not) or
            one such file; or a function from module path to weight.

    Raises:
        FoldError: there is no checkpoint at that path.
    """

    def __init__(self, source: Reference) -> None:
        self._weight = (
            _of_module(source)
            if isinstance(source, nn.Module)
            else _of_checkpoint(Path(source))
            if isinstance(source, (str, Path))
            else source
        )

    def weight(self, fqn: str, shape: tuple[int, ...]) -> Tensor:
        """The float weight ``(out, in)`` of a site, float32 or wider.

        Raises:
            FoldError: there is none, or it has another shape.
        """
        try:
            found = self._weight(fqn)
        except (KeyError, AttributeError) as error:
            raise FoldError(f"{fqn}: the reference has no weight for it ({error})") from error
        if not isinstance(found, Tensor) or not found.is_floating_point():
            raise FoldError(f"{fqn}: the reference gives {_what(found)}, expected a float tensor")
        if tuple(found.shape) != shape:
            raise FoldError(f"{fqn}: the reference's weight has shape {tuple(found.shape)}, the layer's is {shape}")
        return found.detach().to(torch.promote_types(found.dtype, torch.float32))


def _of_module(model: nn.Module) -> Callable[[str], Tensor]:
    def weight(fqn: str) -> Tensor:
        module = model.get_submodule(fqn)
        weight_format = format_of(module)
        if weight_format is None or not weight_format.lossless:
            raise FoldError(f"{fqn}: in the reference it is a {type(module).__name__}, expected a layer of floats")
        return weight_format.dequantize(module)

    return weight


def _of_checkpoint(path: Path) -> Callable[[str], Tensor]:
    from safetensors import safe_open

    files = _files(path)

    def weight(fqn: str) -> Tensor:
        name = _name(files, f"{fqn}.weight")
        with safe_open(files[name], framework="pt") as opened:
            return opened.get_tensor(name)

    return weight


def _files(path: Path) -> Mapping[str, Path]:
    """Tensor name to file."""
    from safetensors import safe_open

    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = made(dict[str, str], parsed(index.read_text(encoding="utf-8"))["weight_map"], "weight_map")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FoldError(f"reference: {index} is damaged: {error}") from None
        if (odd := next((f for f in names.values() if not is_name(f)), None)) is not None:
            raise FoldError(f"reference: {index} names the file {odd[:200]!r}; expected files beside it")
        return {name: path / file for name, file in names.items()}
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise FoldError(f"reference: no safetensors files at {str(path)!r}")
    found: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found.update(dict.fromkeys(opened.keys(), file))
    return found


def _name(files: Mapping[str, Path], wanted: str) -> str:
    """A checkpoint of the bare model, or of one with a head, has a prefix less or more."""
    if wanted in files:
        return wanted
    ends = [n for n in files if n.endswith(f".{wanted}") or wanted.endswith(f".{n}")]
    if len(ends) != 1:
        raise KeyError(f"no tensor {wanted!r} among {len(files)} in the checkpoint")
    return ends[0]


def _what(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
