"""The calibration inputs that a user gives."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from oftfx.errors import FoldError, OftfxError
from oftfx.model.running import Inputs, tensors_of


def digest_of(batch: Inputs) -> str:
    """SHA-256 of one input: names, dtypes, shapes and bytes of its tensors; what else is in it as Python shows it."""
    digest = hashlib.sha256()
    for name, value in sorted(batch.items()) if isinstance(batch, Mapping) else enumerate(batch):
        digest.update(f"{name} {'' if isinstance(value, torch.Tensor) else repr(value)} ".encode())
        for tensor in tensors_of(value):  # of which Python shows the first and last numbers only
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def batches_of(calibration: Any) -> list[Inputs]:
    """An iterable of inputs as a list; of None, an empty one.

    Raises:
        FoldError: it is one input itself, or something in it is none.
    """
    if calibration is None:
        return []
    if isinstance(calibration, (Mapping, torch.Tensor, str)):
        raise FoldError(
            f"calibration: got a {type(calibration).__name__}, expected an iterable of inputs, e.g. [inputs]; each a "
            "dict of keyword arguments or a tuple"
        )
    batches = list(calibration)
    if wrong := [b for b in batches if not isinstance(b, (Mapping, tuple))]:
        raise FoldError(f"calibration: a {type(wrong[0]).__name__} among the inputs; each is a dict or a tuple")
    return batches


def not_taken(batch: Inputs, error: Exception) -> FoldError:
    """What to say of an input with which a model cannot be run; the error itself is its cause."""
    parts = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
    shown = ", ".join(f"{name} {_kind(value)}" for name, value in parts) or "nothing"
    return FoldError(f"calibration: the model cannot be run on ({shown}): {type(error).__name__}: {error}")


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return repr(value)[:40]


def is_of_input(error: Exception) -> bool:
    """Whether an error of a forward can be laid to what it was given, and is not said better by itself."""
    return not isinstance(error, (OftfxError, MemoryError, torch.OutOfMemoryError))
