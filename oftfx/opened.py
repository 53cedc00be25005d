"""Open what is in a directory: a model, its tokenizer, or the model without its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from oftfx.adapter.folded import NOTE, load_folded
from oftfx.errors import MissingExtraError, OftfxError
from oftfx.streaming.directory import CONFIG, CheckpointDirectory
from oftfx.streaming.maps import Maps
from oftfx.streaming.skeleton import Skeleton
from oftfx.streaming.transformers_loader import quiet

_ADAPTER = ("adapter_config.json", "oftfx_plan.json")


class OpenError(OftfxError, ValueError):
    """A directory does not hold what was looked for."""


def open_model(directory: str | Path, *, dtype: str = "auto", **more: Any) -> nn.Module:
    """The model of a directory, in eval mode: what transformers saved, or what `oftfx.FoldResult.save` wrote.

    Only safetensors are read; nothing is unpickled, and nothing is fetched.

    Args:
        directory: with a ``config.json`` and weights.
        dtype: of its floats: ``"auto"``, as stored, or the name of a torch dtype.
        **more: of ``from_pretrained``.

    Raises:
        MissingExtraError: transformers, or a package of its quantization, is not installed.
        OpenError: it is no such directory, or transformers cannot make a model of it.
        AdapterFileError: it is a fold that is not complete.
    """
    path = check_model(directory)
    if dtype not in ("auto", "float32", "float64", "bfloat16", "float16"):
        raise OpenError(f"dtype: got {dtype!r}, expected 'auto', 'float32', 'float64', 'bfloat16' or 'float16'")
    options = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), **more}
    if (path / NOTE).is_file():
        return load_folded(path, **({**more} if dtype == "auto" else options)).eval()
    transformers = _transformers(path)
    kind = _class_of(transformers, path)
    try:
        with quiet():
            model = kind.from_pretrained(path, use_safetensors=True, local_files_only=True, **options)
    except ImportError as error:
        raise OpenError(f"{path}: a package that it needs is missing: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise OpenError(f"{path}: transformers cannot load it: {_first(error)}") from error
    return model.eval()


def open_tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a directory.

    Raises:
        MissingExtraError: transformers is not installed.
        OpenError: there is none.
    """
    return _opened("AutoTokenizer", "tokenizer", Path(directory))


def open_image_processor(directory: str | Path) -> Any:
    """The image processor of a directory.

    Raises:
        MissingExtraError: transformers is not installed.
        OpenError: there is none.
    """
    return _opened("AutoImageProcessor", "image processor", Path(directory))


def open_config(directory: str | Path) -> Any:
    """The configuration of a model's directory.

    Raises:
        MissingExtraError: transformers is not installed.
        OpenError: it is no such directory, or transformers does not know the model.
    """
    path = check_model(directory)
    return _config(_transformers(path), path)


def open_bare(directory: str | Path) -> nn.Module:
    """The model without its weights, on the meta device; of a quantized checkpoint with its quantized layers.

    Raises:
        MissingExtraError: transformers, or a package of its quantization, is not installed.
        OpenError: it is no such directory, or transformers does not know the model.
        FoldError: the checkpoint is not complete.
    """
    path = check_model(directory)
    transformers = _transformers(path)
    if any(path.glob("*.safetensors")):
        made: nn.Module = Skeleton.of(CheckpointDirectory.read(path), Maps(path)).model
        return made
    config = _config(transformers, path)
    if getattr(config, "quantization_config", None) is not None:
        raise OpenError(f"{path}: the config says that the model is quantized, and without its weights nobody sees how")
    kind = _class_of(transformers, path)
    with torch.device("meta"):
        return kind.from_config(config) if kind is transformers.AutoModel else kind(config)


def check_model(directory: str | Path) -> Path:
    """The directory, if a model can be in it.

    Raises:
        OpenError: what it is instead, and what to do.
    """
    path = Path(directory)
    if path.is_dir() and (path / CONFIG).is_file():
        return path
    if path.is_file():
        raise OpenError(f"{path} is a file; expected the directory that a model was saved to, with {CONFIG}")
    if not path.is_dir():
        hub = "" if os.sep not in str(directory).strip(os.sep) and "/" not in str(directory) else (
            f"; a model of the Hub is fetched first: hf download {directory} --local-dir DIRECTORY"
        )  # fmt: skip
        raise OpenError(f"there is no directory {path}{hub}")
    if any((path / name).is_file() for name in _ADAPTER):
        raise OpenError(f"{path} is an adapter; expected the model that it is for, a directory with {CONFIG}")
    there = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
    raise OpenError(f"{path} has no {CONFIG} (there: {there}); expected a directory that transformers saved a model to")


def _opened(kind: str, name: str, path: Path) -> Any:
    transformers = _transformers(path)
    try:
        with quiet():
            return getattr(transformers, kind).from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise OpenError(f"{path}: no {name} can be loaded from it: {_first(error)}") from error


def _config(transformers: Any, path: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise OpenError(f"{path / CONFIG}: transformers cannot make a model of it: {_first(error)}") from error


def _class_of(transformers: Any, path: Path) -> Any:
    config = _config(transformers, path)
    name = (getattr(config, "architectures", None) or ["AutoModel"])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise OpenError(
            f"{path / CONFIG}: its class is {name}, which transformers does not have; load such a model by its own "
            "code and use oftfx from Python"
        )
    return kind


def _transformers(path: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", f"Reading {path}") from error
    return transformers


def _first(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
