"""What is installed, and which formats work here, by trying each."""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn

from oftfx.errors import MissingExtraError
from oftfx.folds import fold
from oftfx.formats.registry import formats
from oftfx.inspecting.packages import Package, packages
from oftfx.precision import relative_error
from oftfx.rotation.spec import OFT
from oftfx.surgery import transform
from oftfx.terminal import render
from oftfx.version import __version__

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
        packages: what oftfx and its extras ask for.
        formats: each tried.
    """

    system: dict[str, str]
    packages: tuple[Package, ...]
    formats: tuple[Tried, ...]

    @property
    def is_sound(self) -> bool:
        """Nothing that is installed fails; a version that was not tested is no failure."""
        return all(f.state != "fails" for f in self.formats)

    def __str__(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.system.items()]
        rows = [
            (p.name, ", ".join(p.extras) or "oftfx", p.here or "not installed", p.allowed, _range(p), p.remark)
            for p in self.packages
        ]
        tables = render("Packages", ("package", "for", "here", "allowed from", "tested", "remark"), rows)
        tables += render("Weight formats, tried on a layer of their own", ("format", "state", "remark"),
                         [(f.name, f.state, f.remark) for f in self.formats])  # fmt: skip
        return "\n".join(lines) + "\n" + tables

    def to_json(self) -> str:
        """All of it as JSON text."""
        return json.dumps(asdict(self), indent=1)


def look(progress: Callable[[int, int], None] | None = None) -> Installation:
    """Look at packages, and try every format: make a layer, rotate it, fold it exactly, and compare outputs."""
    known = formats()
    found = []
    for done, name in enumerate(reversed(known), 1):
        found.append(tried(name))
        if progress is not None:
            progress(done, len(known))
    return Installation(_system(), packages(), tuple(found))


def tried(name: str) -> Tried:
    """Make a layer of one format, rotate it, fold it exactly, and compare outputs."""
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
            folded = fold(model, quantized="float").model
            x = torch.randn(5, SHAPE[0], dtype=folded[0].weight.dtype)  # layers may say another dtype and take this
            with torch.no_grad():
                kept, unfolded = folded(x).float(), model(x).float()
            distance = relative_error(kept, unfolded)
        except Exception as error:  # any package's
            return Tried(name, "fails", f"{type(error).__name__}: {_short(error)}")
    remark = f"folded to floats and unfolded differ by {distance:.1e}"
    return Tried(name, "works" if distance < 2e-2 else "fails", remark)


def _range(package: Package) -> str:
    return package.oldest if package.oldest == package.newest else f"{package.oldest} to {package.newest}"


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
