"""Save and load the rotations that a fold left in front of quantized weights (``quantized="keep"``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import torch.nn as nn
from torch import Tensor

from oftfx.errors import AdapterFileError, FoldError
from oftfx.files import write_whole
from oftfx.formats.exact import choose_kernel, use_exact
from oftfx.formats.registry import format_named
from oftfx.model.sites import weight_device
from oftfx.placement.attach import attach
from oftfx.placement.find import rotated_sites
from oftfx.placement.frozen import FROZEN
from oftfx.planning.program import Program
from oftfx.rotation.module import FrozenRotation

FILE = "oftfx_rotations.safetensors"
_VERSION = "1"

M = TypeVar("M", bound=nn.Module)


def save_rotations(model: nn.Module, path: str | Path) -> Path:
    """Write the fixed rotations of a folded model beside its checkpoint.

    A fold with ``quantized="keep"`` leaves quantized weights bit for bit and rotations in front of them, which the
    format's own loader does not know: after ``model.save_pretrained(directory)`` call this with the same directory, and
    `load_rotations` after ``from_pretrained``.

    Args:
        model: the folded model; one with trainable rotations is saved with `save_adapter`.
        path: directory; the file in it is ``oftfx_rotations.safetensors``: blocks ``(blocks, b, b)``, each rotation
            once, and the module paths in its metadata.

    Returns:
        The file.

    Raises:
        FoldError: the model has no fixed rotations.
    """
    from safetensors.torch import save

    numbers: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    sites: dict[str, list[str]] = {}
    for fqn, placement in rotated_sites(model):
        for rotation in placement.fixed:
            key = numbers.setdefault(id(rotation), str(len(numbers)))
            tensors[key] = rotation.blocks.detach().cpu().contiguous()
            sites.setdefault(fqn, []).append(key)
    if not sites:
        raise FoldError("this model has no fixed rotations: fold(quantized='keep') leaves them, at quantized layers")
    file = Path(path) / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, save(tensors, {"oftfx_rotations": _VERSION, "sites": json.dumps(sites)}))
    return file


def load_rotations(model: M, path: str | Path) -> M:
    """Put saved rotations in front of the layers of a model, in place.

    Args:
        model: the same model, loaded by its format's own loader.
        path: the directory that `save_rotations` wrote to.

    Returns:
        ``model``, which now computes what the folded one did.

    Raises:
        AdapterFileError: there is no such file, or it does not fit the model; nothing is changed then.
    """
    sites, tensors = _read(Path(path) / FILE)
    known = {s.fqn: s for s in Program.of(model).sites}
    rotated = {fqn for fqn, _ in rotated_sites(model)}
    for fqn, keys in sites.items():
        if fqn not in known or not known[fqn].is_layer:
            raise AdapterFileError(f"{path}: it rotates {fqn}, which {type(model).__name__} does not have as a layer")
        if fqn in rotated:
            raise AdapterFileError(f"{path}: {fqn} has rotations already")
        for key in keys:
            count, size = tensors[key].shape[:2]
            if count * size != known[fqn].in_features:
                raise AdapterFileError(
                    f"{path}: {fqn} has in_features {known[fqn].in_features}, the saved rotation {count * size}"
                )
    modules = dict(model.named_modules())
    made: dict[str, FrozenRotation] = {}
    for fqn, keys in sites.items():
        module = modules[known[fqn].module]
        format_named(known[fqn].format).prepare(module)
        if choose_kernel(module, "auto")[0] == "exact":
            use_exact(module)
        placement = attach(modules, known[fqn], "activation")
        for index, key in enumerate(keys):
            first = key not in made
            rotation = made.setdefault(key, FrozenRotation(tensors[key].to(weight_device(module))))
            placement.fixed.append(rotation)
            if first:
                placement.hold(FROZEN if len(keys) == 1 else f"{FROZEN}_{index}", rotation)
    return model


def _read(file: Path) -> tuple[dict[str, list[str]], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise AdapterFileError(f"there is no {FILE} in {str(file.parent)!r}; save_rotations writes it")
    try:
        with safe_open(file, framework="pt") as opened:
            notes = opened.metadata() or {}
            tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
        if notes["oftfx_rotations"] != _VERSION:
            raise AdapterFileError(f"{file}: version {notes['oftfx_rotations']}; this oftfx reads {_VERSION}")
        sites: dict[str, list[str]] = json.loads(notes["sites"])
        shapes = [tensors[k].shape for keys in sites.values() for k in keys]
    except (SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"{file} is damaged or not of oftfx: {error}") from None
    if wrong := [s for s in shapes if len(s) != 3 or s[1] != s[2]]:
        raise AdapterFileError(f"{file}: a rotation of shape {tuple(wrong[0])}; expected (blocks, b, b)")
    return sites, tensors
