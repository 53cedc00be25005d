"""Tensors as the bytes of their files, there and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from oftfx.errors import FoldError
from oftfx.streaming.journal import Done
from oftfx.streaming.maps import NAMES
from oftfx.streaming.work import Fold, Target, Work
from oftfx.streaming.writer import put_at


def bytes_of(tensor: torch.Tensor) -> Any:
    """Its bytes, as numpy has them."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def parts_of(unit: Fold, tensors: Mapping[str, torch.Tensor]) -> tuple[list[tuple[Target, Any]], dict[str, bytes]]:
    """What is written, and what comes last; both as was planned."""
    parts, tails = list[tuple[Target, Any]](), dict[str, bytes]()
    for target in unit.targets:
        tensor = tensors.get(target.name)
        if tensor is None:
            there = ", ".join(sorted(tensors)) or "nothing"
            raise FoldError(f"{unit.path}: its fold gave no {target.name} (it gave {there})")
        if target.begin is None:
            tails[target.name] = bytes(bytes_of(tensor))
            continue
        got, wanted = (NAMES[tensor.dtype], tuple(tensor.shape)), (target.dtype, target.shape)
        if got != wanted:
            raise FoldError(
                f"{target.name}: its fold gave {got[0]} {list(got[1])}, the file has {wanted[0]} {list(wanted[1])}; "
                "load the model and use oftfx.fold"
            )
        parts.append((target, bytes_of(tensor)))
    return parts, tails


def read_back(directory: Path, target: Target, done: Done) -> torch.Tensor:
    """A tensor that was written."""
    dtype = dtype_named(target.dtype)
    if target.begin is None:
        return torch.frombuffer(bytearray(done.tails[target.name]), dtype=dtype)
    if not target.nbytes:
        return torch.empty(target.shape, dtype=dtype)
    with (directory / target.file).open("rb") as file:
        file.seek(target.begin)
        return torch.frombuffer(bytearray(file.read(target.nbytes)), dtype=dtype).view(target.shape)


def dtype_named(name: str) -> torch.dtype:
    """Torch's dtype by safetensors' name."""
    return next(d for d, n in NAMES.items() if n == name)


def write_headers(directory: Path, work: Work, done: Mapping[int, Done]) -> None:
    """What comes last in each file, its header, and its length."""
    tails = {n: t for d in done.values() for n, t in d.tails.items()}
    for file in work.files:
        handle, places = os.open(directory / file.file, os.O_WRONLY | os.O_CREAT, 0o644), dict[str, tuple[int, int]]()
        try:
            place = max((t.end or 0 for t in file.targets.values()), default=0) or file.start
            for name, target in file.targets.items():
                if target.begin is None:
                    put_at(handle, tails[name], place)
                    places[name] = place, len(tails[name])
                    place += len(tails[name])
            text = file.header(places)
            put_at(handle, (file.start - 8).to_bytes(8, "little") + text.ljust(file.start - 8), 0)
            os.ftruncate(handle, place)
            os.fsync(handle)
        finally:
            os.close(handle)
