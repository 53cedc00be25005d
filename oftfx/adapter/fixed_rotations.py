"""Save and load the rotations that a fold left in front of quantized weights (``quantized="keep"``)."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.nn as nn
from torch import Tensor

from oftfx.adapter.packed import packed
from oftfx.errors import AdapterFileError, FoldError, warn
from oftfx.files import of_version, write_whole
from oftfx.folding.checkpoint import checkpoint_digest
from oftfx.formats.exact import choose_kernel, use_exact
from oftfx.formats.registry import format_of
from oftfx.model.compressed import keep_compressed
from oftfx.model.site import Site
from oftfx.model.sites import weight_device
from oftfx.placement.attach import attach
from oftfx.placement.find import rotated_sites
from oftfx.placement.frozen import FROZEN
from oftfx.placement.torch_private import forget_compiled
from oftfx.planning.program import Program
from oftfx.rotation.frozen import FrozenRotation
from oftfx.typed_json import made, parsed

FILE = "oftfx_rotations.safetensors"
CONFIG_KEY = "oftfx_rotations"
_VERSION = 1

M = TypeVar("M", bound=nn.Module)


def save_rotations(model: nn.Module, path: str | Path) -> Path:
    """Write the fixed rotations of a folded model beside its checkpoint.

    A fold with ``quantized="keep"`` leaves quantized weights bit for bit and rotations in front of them, which the
    format's own loader does not know: after ``model.save_pretrained(directory)`` call this with the same directory, and
    `load_rotations` after ``from_pretrained``.

    Args:
        model: the folded model; one with trainable rotations is saved with `save_adapter`.
        path: directory; the file in it is ``oftfx_rotations.safetensors``: blocks ``(blocks, b, b)``, each rotation
            once, and in its metadata the module paths and `checkpoint_digest` of the weights that are there.

    Returns:
        The file.

    Raises:
        FoldError: the model has no fixed rotations.
        AdapterFileError: the file cannot be written; one that was there is as it was.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.formats import format_named
        >>> base = torch.nn.Sequential(format_named("bnb8").make_tiny(66, 10))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> file = oftfx.save_rotations(oftfx.fold(model, quantized="keep").model, "folded")
        >>> file.name
        'oftfx_rotations.safetensors'
    """
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
    write_whole(file, packed(tensors, rotation_notes(file.parent, sites)), AdapterFileError)
    return file


def rotation_notes(directory: Path, sites: Mapping[str, list[str]]) -> dict[str, str]:
    """What such a file says of itself: for each site the keys of its blocks, in the order in which they act."""
    notes = {"oftfx_rotations": str(_VERSION), "sites": json.dumps(sites)}
    if digest := checkpoint_digest(directory):
        notes["checkpoint"] = digest
    return notes


def load_rotations(model: M, path: str | Path) -> M:
    """Put saved rotations in front of the layers of a model, in place.

    Args:
        model: the same model, loaded by its format's own loader.
        path: the directory that `save_rotations` wrote to.

    Returns:
        ``model``, which now computes what the folded one did.

    Raises:
        AdapterFileError: there is no such file, it was written for other weights than those beside it, or it does not
            fit the model; nothing is changed then.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.formats import format_named
        >>> base = torch.nn.Sequential(format_named("bnb8").make_tiny(66, 10))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> folded, x = oftfx.fold(model, quantized="keep").model, torch.randn(5, 66)
        >>> loaded = oftfx.load_rotations(base, oftfx.save_rotations(folded, "folded").parent)
        >>> torch.equal(loaded(x), folded(x))
        True
    """
    sites, tensors = _read(Path(path) / FILE)
    program = Program.of(model)
    known, modules = {s.fqn: s for s in program.sites}, program.index.modules
    rotated = {fqn for fqn, _ in rotated_sites(program.index)}
    for fqn, keys in sites.items():
        if fqn not in known:
            raise AdapterFileError(f"{path}: it rotates {fqn}, which {type(model).__name__} does not have as a layer")
        if fqn in rotated:
            raise AdapterFileError(f"{path}: {fqn} has rotations already")
        for key in keys:
            count, size = tensors[key].shape[:2]
            if count * size not in _widths(known[fqn]):
                raise AdapterFileError(
                    f"{path}: {fqn} has in_features {known[fqn].in_features}, the saved rotation {count * size}"
                )
    keep_compressed(model)
    multiply_right({fqn: modules[known[fqn].module] for fqn in sites})
    made: dict[str, FrozenRotation] = {}
    for fqn, keys in sites.items():
        module = modules[known[fqn].module]
        site, blocks = known[fqn], tensors[keys[0]]
        each = len(blocks) * blocks.shape[-1] != site.in_features
        placement = attach(modules, site, "activation" if site.is_layer else "weight", each=each)
        for index, key in enumerate(keys):
            first = key not in made
            rotation = made.setdefault(key, FrozenRotation(tensors[key].to(weight_device(module))))
            placement.fixed.append(rotation)
            if first:
                placement.hold(FROZEN if len(keys) == 1 else f"{FROZEN}_{index}", rotation)
    forget_compiled()
    guard_saving(model)
    return model


def _widths(site: Site) -> tuple[int, ...]:
    """Over how many numbers a rotation may go: of experts either one for all of them, or one for each."""
    return site.in_features, site.in_features * max(site.experts, 1)


def multiply_right(layers: Mapping[str, nn.Module]) -> None:
    """Prepare quantized layers as a fold leaves them: those whose own forward cannot be relied on multiply exactly."""
    notices: dict[str, str] = {}
    for fqn, layer in layers.items():
        found = format_of(layer)
        if found is None or found.lossless:
            continue
        if notice := found.prepare(layer):
            notices[fqn] = notice
        if choose_kernel(layer, "auto")[0] == "exact":
            use_exact(layer, fast=True)
    if notices:
        fqn, notice = next(iter(notices.items()))
        warn(f"{fqn}: {notice}" + (f". So it is with {len(notices) - 1} more layers" if len(notices) > 1 else ""))


def _read(file: Path) -> tuple[dict[str, list[str]], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise AdapterFileError(f"there is no {FILE} in {str(file.parent)!r}; save_rotations writes it")
    try:
        with safe_open(file, framework="pt") as opened:
            notes = opened.metadata() or {}
            tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
        if (version := int(notes["oftfx_rotations"])) != _VERSION:
            raise AdapterFileError(f"{file} has {of_version(version, _VERSION)}")
        if notes.get("checkpoint", here := checkpoint_digest(file.parent)) != here and here is not None:
            raise AdapterFileError(
                f"{file} was written for other weights than those beside it. Take both from one save, or call "
                "save_rotations again with the folded model"
            )
        sites = {f: [*keys] for f, keys in made(dict[str, tuple[str, ...]], parsed(notes["sites"]), "sites").items()}
        shapes = [tensors[k].shape for keys in sites.values() for k in keys]
    except (SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"{file} is damaged or not of oftfx: {error}") from None
    if wrong := [s for s in shapes if len(s) != 3 or s[1] != s[2]]:
        raise AdapterFileError(f"{file}: a rotation of shape {tuple(wrong[0])}; expected (blocks, b, b)")
    return sites, tensors


class SavesRotations:
    """``save_pretrained`` of one model with fixed rotations: it writes them beside the checkpoint, and says so.

    It stands in the instance, in front of the class's own. A hook of the state_dict knows no directory, and another
    class would no longer be the user's. Holding the model, it follows it through copies and pickles, and Trainer, the
    Hub's mixin and the user all call it by name. `guard_saving` puts it there and takes it away.

    Args:
        model: the model.
        own: what stood in the instance before, if anything did.
    """

    def __init__(self, model: nn.Module, own: Callable[..., Any] | None) -> None:
        self.model, self.own = model, own

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Write checkpoint and rotations; the arguments are those of the model's own method.

        Raises:
            FoldError: with ``push_to_hub=True``, which uploads before the rotations are there.
        """
        given = inspect.signature(self.native).bind(*args, **kwargs).arguments
        if given.get("push_to_hub"):
            raise FoldError(
                "save_pretrained(push_to_hub=True) uploads before the rotations of this folded model are written; "
                "call model.push_to_hub(name), or upload the directory after save_pretrained"
            )
        self.write(*args, **kwargs)
        if given.get("is_main_process", True):
            directory = str(next(iter(given.values())))
            save_rotations(self.model, directory)
            warn(
                f"wrote {FILE} beside the checkpoint: this model has rotations in front of quantized layers, which "
                f"from_pretrained alone drops. Load it with oftfx.load_folded({directory!r}), or call "
                "oftfx.load_rotations after from_pretrained; FoldResult.save writes a directory that is checked whole"
            )

    def write(self, *args: Any, **kwargs: Any) -> None:
        """The checkpoint alone; its configuration names the file of the rotations, for people who look at it."""
        config = getattr(self.model, "config", None)
        named = hasattr(config, "to_json_file")
        if named:
            setattr(config, CONFIG_KEY, FILE)
        try:
            self.native(*args, **kwargs)
        finally:
            if named:
                delattr(config, CONFIG_KEY)

    @property
    def native(self) -> Callable[..., Any]:
        """The model's own method."""
        return self.own or type(self.model).save_pretrained.__get__(self.model)  # type: ignore[attr-defined]


def guard_saving(model: nn.Module) -> None:
    """Let ``save_pretrained`` of a model with fixed rotations write them as well; one without has its own back."""
    own = vars(model).get("save_pretrained")
    if any(p.fixed for _, p in rotated_sites(model)):
        if hasattr(model, "save_pretrained") and not isinstance(own, SavesRotations):
            vars(model)["save_pretrained"] = SavesRotations(model, own)
    elif isinstance(own, SavesRotations):
        del vars(model)["save_pretrained"]
        if own.own is not None:
            vars(model)["save_pretrained"] = own.own
    # A configuration that was read with rotations names them; what is written says it anew.
    if CONFIG_KEY in getattr(getattr(model, "config", None), "__dict__", {}):
        delattr(model.config, CONFIG_KEY)  # type: ignore[union-attr, arg-type]
