"""Tell checkpoints apart by what is in their files."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import BinaryIO

from oftfx.errors import AdapterFileError
from oftfx.typed_json import parsed

_TENSORS = ("model*.safetensors", "diffusion_pytorch_model*.safetensors")
_OTHERS = ("pytorch_model*.bin", "qmodel.pt")
ROTATION = re.compile(r"(^|\.)oft(_\w+)?\.")
"""In names of parameters and buffers: part of a rotation, not of the model."""
_SAMPLES, _SAMPLE = 8, 64


def checkpoint_digest(directory: Path) -> str | None:
    """SHA-256 over a model's weights in a directory; None where there are none.

    Of each tensor: name, dtype, shape, and 64 bytes at eight places over its length, so it costs no more than opening
    the files. Which file a tensor is in does not count, nor do rotations: a checkpoint that was cut into other shards,
    or was loaded and saved again by a loader that knows no rotations, is the same one. Files of other formats count
    whole.

    Raises:
        AdapterFileError: a file is damaged.
    """
    parts: list[str] = []
    for pattern in _TENSORS:
        for file in sorted(directory.glob(pattern)):
            parts += _tensors(file)
    for pattern in _OTHERS:
        for file in sorted(directory.glob(pattern)):
            with file.open("rb") as stream:
                parts.append(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}")
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest() if parts else None


def _tensors(file: Path) -> list[str]:
    """A line for each tensor. The format: 8 bytes length of the header, the header as JSON, all bytes in one piece."""
    with file.open("rb") as stream:
        try:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("it is shorter than its header")
            header = parsed(stream.read(length))
            entries = [(n, e) for n, e in header.items() if n != "__metadata__" and not ROTATION.search(n)]
            return [
                f"{name} {entry['dtype']} {entry['shape']} {_sample(stream, 8 + length, *entry['data_offsets'])}"
                for name, entry in entries
            ]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError) as error:
            raise AdapterFileError(f"{file} is damaged or not a safetensors file: {error}") from None


def _sample(stream: BinaryIO, start: int, begin: int, end: int) -> str:
    digest = hashlib.sha256()
    step = max(_SAMPLE, math.ceil((end - begin) / _SAMPLES))
    for place in range(begin, end, step):
        stream.seek(start + place)
        digest.update(stream.read(min(_SAMPLE, end - place)))
    return digest.hexdigest()
