"""What a checkpoint directory holds, read from the headers of its safetensors files; no tensor is touched."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oftfx.errors import FoldError
from oftfx.files import is_name
from oftfx.typed_json import parsed, read_object

INDEX, WHOLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Of one number; a dtype that is not here is copied as it is, by the offsets that the header gives."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".npz")
_INDICES = (".index.json",)


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        name: in the file.
        file: its name in the directory.
        dtype: as safetensors writes it.
        shape: as stored.
        begin: first byte, from the start of the file.
        end: one behind the last.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Of its numbers."""
        return self.end - self.begin


@dataclass(frozen=True)
class Shard:
    """One file.

    Attributes:
        file: its name.
        notes: the header's metadata.
        names: of its tensors, as the header lists them.
        tensors: in the order of their bytes.
        header: SHA-256 of its header.
    """

    file: str
    notes: Mapping[str, str] | None
    names: tuple[str, ...]
    tensors: tuple[Stored, ...]
    header: str


@dataclass(frozen=True)
class CheckpointDirectory:
    """A directory as ``save_pretrained`` writes it.

    Attributes:
        path: the directory.
        shards: its weights.
        index: of the shards, as JSON; None where there is one file without.
        others: files that are copied.
        left: names that are not: weights in other files, folders.
    """

    path: Path
    shards: tuple[Shard, ...]
    index: Mapping[str, Any] | None
    others: tuple[str, ...]
    left: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> CheckpointDirectory:
        """Read the headers, and hold them against the files and the index.

        Raises:
            FoldError: there is no such checkpoint, a file is damaged or missing, or two hold one name.
        """
        if not path.is_dir():
            raise FoldError(f"{path} is no directory; expected one with {CONFIG} and {WHOLE} or {INDEX}")
        if not (path / CONFIG).is_file():
            raise FoldError(f"{path} has no {CONFIG}; expected a directory that transformers saved a model to")
        index = read_object(path / INDEX) if (path / INDEX).is_file() else None
        files = [WHOLE] if index is None else _files_of(index, path)
        if missing := [f for f in files if not (path / f).is_file()]:
            there = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix in _WEIGHTS)) or "no weights"
            raise FoldError(
                f"{path}: {missing[0]} is missing"
                + (f", which {INDEX} names" if index is not None else "")
                + f" (there: {there}); weights in safetensors files are needed. Load the model and save it with "
                "save_pretrained, or fetch what is missing"
            )
        shards = tuple(_shard(path / f) for f in files)
        result = cls(path, shards, index, *_others(path, {*files, INDEX, CONFIG}))
        result._check()
        return result

    @property
    def tensors(self) -> dict[str, Stored]:
        """All by name."""
        return {t.name: t for t in self}

    def __iter__(self) -> Iterator[Stored]:
        return (t for s in self.shards for t in s.tensors)

    def fingerprint(self, digest: str | None) -> str:
        """Tells whether a run goes on with the same input: headers, sizes, times of the files, and a digest of some."""
        parts = [f"{digest}"]
        for name in (*(s.file for s in self.shards), *self.others, CONFIG):
            facts = (self.path / name).stat()
            parts.append(f"{name} {facts.st_size} {facts.st_mtime_ns}")
        parts += [s.header for s in self.shards]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _check(self) -> None:
        seen: dict[str, str] = {}
        for tensor in self:
            if (other := seen.setdefault(tensor.name, tensor.file)) != tensor.file:
                raise FoldError(f"{self.path}: {tensor.name} is in {other} and in {tensor.file}; expected it in one")
        if self.index is not None:
            named: Mapping[str, str] = self.index["weight_map"]
            for name, file in named.items():
                if seen.get(name) != file:
                    there = f"it is in {seen[name]}" if name in seen else "no file has it"
                    raise FoldError(f"{self.path}: {INDEX} names {name} in {file}, but {there}; is it complete?")


def _files_of(index: Mapping[str, Any], path: Path) -> list[str]:
    named = index.get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(f, str) for f in named.values()):
        raise FoldError(f"{path / INDEX}: no weight_map from tensor names to files")
    files = sorted({*named.values()})
    if (odd := next((f for f in files if not is_name(f)), None)) is not None:
        raise FoldError(f"{path / INDEX}: names the file {odd[:200]!r}; expected files beside it")
    return files


def _shard(file: Path) -> Shard:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError(f"its header has {length} bytes, the file {size}")
            text = stream.read(length)
        header: dict[str, Any] = parsed(text)
        notes = header.pop("__metadata__", None)
        found = [
            Stored(n, file.name, str(e["dtype"]), tuple(map(int, e["shape"])), *(8 + length + o for o in _offsets(e)))
            for n, e in header.items()
        ]
        _check_bytes(found, 8 + length, size)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise FoldError(f"{file} is damaged or not a safetensors file: {error}; fetch it again") from None
    tensors = tuple(sorted(found, key=lambda t: (t.begin, t.end)))
    return Shard(file.name, notes, tuple(header), tensors, hashlib.sha256(text).hexdigest())


def _offsets(entry: Mapping[str, Any]) -> tuple[int, int]:
    begin, end = map(int, entry["data_offsets"])
    return begin, end


def _check_bytes(tensors: list[Stored], start: int, size: int) -> None:
    """Every byte of the file belongs to one tensor, and each has as many as its shape says."""
    place = start
    for tensor in sorted(tensors, key=lambda t: (t.begin, t.end)):
        if tensor.begin != place or tensor.end < tensor.begin:
            raise ValueError(f"{tensor.name} begins at byte {tensor.begin}, expected {place}")
        bits = BITS.get(tensor.dtype)
        if bits is not None and math.prod(tensor.shape) * bits != 8 * tensor.nbytes:
            raise ValueError(f"{tensor.name} {tensor.dtype} {list(tensor.shape)} has {tensor.nbytes} bytes")
        place = tensor.end
    if place != size:
        raise ValueError(f"its tensors end at byte {place}, the file has {size}")


def _others(path: Path, known: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    copied, left = [], []
    for entry in sorted(path.iterdir()):
        name = entry.name
        if name in known or name.startswith("."):
            continue
        if entry.is_file() and entry.suffix not in _WEIGHTS and not name.endswith(_INDICES):
            copied.append(name)
        else:
            left.append(f"{name}/" if entry.is_dir() else name)
    return tuple(copied), tuple(left)
