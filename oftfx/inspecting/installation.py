"""What is installed, and which formats work here, by trying each."""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn as nn

from oftfx.errors import MissingExtraError
from oftfx.folds import fold
from oftfx.formats.registry import formats
from oftfx.precision import relative_error
from oftfx.rotation.spec import OFT
from oftfx.surgery import transform
from oftfx.terminal import render
from oftfx.version import __version__

FLOORS = {"torch": "2.7", "safetensors": "0.4.5"}
TESTED = {
    "torch": "2.13.0", "safetensors": "0.8.0", "transformers": "5.24.0", "accelerate": "1.15.0", "peft": "0.21.2",
    "bitsandbytes": "0.50.0", "onnx": "1.22.0", "onnxruntime": "1.28.0", "onnxruntime-genai": "0.18.0",
}  # fmt: skip
EXTRA_OF = {
    "bnb4": "bnb", "bnb8": "bnb", "gptq": "gptq", "awq": "awq", "aqlm": "aqlm", "eetq": "eetq", "hqq": "hqq",
    "torchao": "torchao", "quanto": "quanto", "compressed_tensors": "compressed-tensors", "inc_fp8": "inc",
    "inc_woq": "inc", "hf_fp8": "hf", "dense": "",
}  # fmt: skip
SHAPE = (128, 192)  # multiples of what kernels take at a time


@dataclass(frozen=True)
class Tried:
    """One weight format.

    Attributes:
        name: of it.
        state: ``works``, ``missing`` or ``fails``.
        remark: what is missing, what failed, or how exact it is.
    """

    name: str
    state: str
    remark: str


@dataclass(frozen=True)
class Installation:
    """What is here.

    Attributes:
        system: Python, machine, cores, CPU capability, GPUs.
        packages: of each extra: the version that is here (empty: none), the oldest that is allowed, the newest that was
            tested.
        formats: each tried.
    """

    system: dict[str, str]
    packages: tuple[tuple[str, str, str, str], ...]
    formats: tuple[Tried, ...]

    @property
    def is_sound(self) -> bool:
        """Nothing that is installed fails."""
        return all(f.state != "fails" for f in self.formats)

    def __str__(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.system.items()]
        rows = [(n, here or "not installed", oldest, newest) for n, here, oldest, newest in self.packages]
        tables = render("Packages", ("package", "here", "oldest allowed", "newest tested"), rows)
        tables += render("Weight formats, tried on a layer of their own", ("format", "state", "remark"),
                         [(f.name, f.state, f.remark) for f in self.formats])  # fmt: skip
        return "\n".join(lines) + "\n" + tables

    def to_json(self) -> str:
        """All of it as JSON text."""
        return json.dumps(asdict(self), indent=1)


def look(progress: Callable[[int, int], None] | None = None) -> Installation:
    """Look at packages, and try every format: make a layer, rotate it, fold it exactly, and compare outputs."""
    known = formats()
    tried = []
    for done, name in enumerate(reversed(known), 1):
        tried.append(_tried(name))
        if progress is not None:
            progress(done, len(known))
    return Installation(_system(), tuple(_packages()), tuple(tried))


def _tried(name: str) -> Tried:
    known = formats()[name]
    with _quiet():
        try:
            layer = known.make_tiny(*SHAPE)
        except MissingExtraError as error:
            return Tried(name, "missing", str(error))
        except ImportError as error:
            extra = EXTRA_OF.get(name, "")
            return Tried(name, "missing", f"{error}; pip install 'oftfx[{extra}]'")
        except Exception as error:  # any package's
            return Tried(name, "fails", f"making a layer: {type(error).__name__}: {_short(error)}")
        try:
            torch.manual_seed(0)
            model = transform(nn.Sequential(layer), {"*": OFT(32, init="normal")}, inplace=True).eval()  # type: ignore[union-attr]
            x = torch.randn(5, SHAPE[0], dtype=_dtype(known, layer))
            with torch.no_grad():
                unfolded = model(x).float()
                kept = fold(model, quantized="float").model(x).float()
            distance = relative_error(kept, unfolded)
        except Exception as error:  # any package's
            return Tried(name, "fails", f"{type(error).__name__}: {_short(error)}")
    remark = f"folded to floats and unfolded differ by {distance:.1e}"
    return Tried(name, "works" if distance < 2e-2 else "fails", remark)


def _dtype(known: Any, layer: nn.Module) -> torch.dtype:
    try:
        found = known.dtype(layer)
    except Exception:  # it is only a guess for the input
        return torch.float32
    return found if found in (torch.float32, torch.float16, torch.bfloat16) else torch.float32


def _packages() -> Iterator[tuple[str, str, str, str]]:
    floors = dict(FLOORS)
    for line in metadata.requires("oftfx") or ():
        requirement = line.partition(";")[0].strip()
        name, _, floor = requirement.partition(">=")
        name = name.partition("[")[0].partition("==")[0].strip()
        if name != "oftfx":
            floors.setdefault(name, floor.partition(",")[0].strip())
    for name, floor in floors.items():
        try:
            here = metadata.version(name)
        except metadata.PackageNotFoundError:
            here = ""
        yield name, here, floor, TESTED.get(name, "")


def _system() -> dict[str, str]:
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "oftfx": __version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "CPU": torch.backends.cpu.get_cpu_capability(),
        "GPU": ", ".join(gpus) or "none that torch sees",
        "threads of torch": str(torch.get_num_threads()),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _short(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:160]
