"""What a path holds: names, shapes and notes from the headers; numbers when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from oftfx.adapter.peft_files import CONFIG_FILE, PLAN_FILE, WEIGHT_FILE
from oftfx.adapter.read import check_finite, no_file, read_json
from oftfx.errors import AdapterFileError
from oftfx.files import finish_landing, is_name

INDEX_FILE, MODEL_FILE = "model.safetensors.index.json", "model.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Head:
    """Dtype (safetensors' word for it) and shape of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """An adapter's files, opened but not read.

    Attributes:
        path: what was given.
        files: the safetensors files, by the name of each tensor.
        heads: dtype and shape of each tensor.
        notes: metadata of the file.
        config: ``adapter_config.json`` beside it, or None.
        has_plan: whether our own plan is beside it.
    """

    path: Path
    files: dict[str, Path]
    heads: dict[str, Head]
    notes: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    has_plan: bool = False
    _opened: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> Source:
        """Read headers and configuration.

        Args:
            path: a directory, or one safetensors file; a configuration beside it counts.

        Raises:
            AdapterFileError: no such file, several that it could be, a pickled or a damaged one.
        """
        path = Path(path)
        finish_landing(path, CONFIG_FILE, PLAN_FILE)
        weights = _weights_of(path)
        files: dict[str, Path] = {}
        heads: dict[str, Head] = {}
        notes: dict[str, str] = {}
        for file in _shards(weights) if weights.name == INDEX_FILE else (weights,):
            found, notes = _headers(file)
            heads |= found
            files |= dict.fromkeys(found, file)
        config = weights.parent / CONFIG_FILE
        return cls(
            path,
            files,
            heads,
            notes,
            read_json(config) if config.is_file() else None,
            (weights.parent / PLAN_FILE).is_file() and weights.name == WEIGHT_FILE,
        )

    @property
    def directory(self) -> Path:
        """Where the files are."""
        return self.path if self.path.is_dir() else self.path.parent

    def tensors(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by their keys, on the CPU.

        Raises:
            AdapterFileError: some hold numbers that are not finite.
        """
        result = {}
        for key in keys:
            file = self.files[key]
            if file not in self._opened:
                self._opened[file] = _opened(file)
            result[key] = self._opened[file].get_tensor(key)
        check_finite(result, str(self.path))
        return result

    def wide(self, key: str) -> Tensor:
        """One tensor of floats, in float64.

        Raises:
            AdapterFileError: not of floats, or not finite.
        """
        if not self.heads[key].dtype.startswith(("F", "BF")):
            raise AdapterFileError(f"{self.named(key)} has dtype {self.heads[key].dtype}, expected a float")
        return self.tensors([key])[key].double()

    def named(self, key: str) -> str:
        """The words that begin a message about one tensor."""
        return f"{self.files.get(key, self.path)}: {key}"


def _weights_of(path: Path) -> Path:
    if path.suffix in _PICKLED:
        raise AdapterFileError(_pickled(path))
    if path.is_file():
        return path
    for name in (WEIGHT_FILE, INDEX_FILE, MODEL_FILE):
        if (path / name).is_file():
            return path / name
    there = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else []
    found = [p for p in there if p.suffix == ".safetensors"]
    if len(found) == 1 and not any((path / n).exists() for n in (CONFIG_FILE, PLAN_FILE)):
        return found[0]
    if len(found) > 1:
        raise AdapterFileError(
            f"{path} holds {len(found)} safetensors files, any of which may be the adapter: "
            f"{', '.join(p.name for p in found[:8])}. Give the path of one"
        )
    if pickled := next((p for p in there if p.suffix in _PICKLED and p.name.startswith("adapter_model")), None):
        raise AdapterFileError(_pickled(pickled))
    raise AdapterFileError(no_file(path / WEIGHT_FILE if path.suffix != ".safetensors" else path))


def _pickled(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run any code when it is loaded, so oftfx never does. Where you trust it, "
        "write it again as safetensors: safetensors.torch.save_file(torch.load(path, weights_only=True), "
        "'adapter.safetensors')"
    )


def _opened(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt").__enter__()
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(f"{file} is damaged or not a safetensors file: {error}") from None


def _headers(file: Path) -> tuple[dict[str, Head], dict[str, str]]:
    opened = _opened(file)
    slices = {k: opened.get_slice(k) for k in opened.keys()}  # noqa: SIM118
    heads = {k: Head(s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()}
    return heads, opened.metadata() or {}


def _shards(index: Path) -> list[Path]:
    """The files that an index names; they have to be beside it."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(n, str) for n in named.values()):
        raise AdapterFileError(f"{index}: expected a 'weight_map' from names to files")
    if (
        outside := next((n for n in named.values() if not is_name(n) or not n.endswith(".safetensors")), None)
    ) is not None:
        raise AdapterFileError(f"{index} names {outside[:200]!r}, which is no safetensors file beside it")
    files = [index.parent / n for n in dict.fromkeys(named.values())]
    if missing := next((f for f in files if not f.is_file()), None):
        raise AdapterFileError(f"{index} names {missing.name}, which is not there; is the checkpoint complete?")
    return files
