"""The model of a checkpoint without its weights: layers of the right classes, and where their tensors are stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FoldError
from oftfx.formats.registry import format_of
from oftfx.model.structure import HOOKS
from oftfx.streaming.directory import CheckpointDirectory, Stored
from oftfx.streaming.maps import Maps
from oftfx.streaming.transformers_loader import Naming, load, may_lack, meta_model, module_path, quiet, ties


class Holder(nn.Module):
    """A module tree that has only some layers of a model, at their paths; loaders and passes take it for the model.

    Args:
        model: whose configuration and naming it has.
        layers: by path.
    """

    def __init__(self, model: Any, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.config = model.config
        self.base_model_prefix = model.base_model_prefix
        for path, layer in layers.items():
            *above, leaf = path.split(".")
            where: Any = self
            for name in above:
                where = where._modules.setdefault(name, nn.Module())
            where._modules[leaf] = layer

    def get_parameter_or_buffer(self, name: str) -> Any:
        """As a transformers model has it."""
        owner, _, leaf = name.rpartition(".")
        return getattr(self.get_submodule(owner), leaf)


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device and its checkpoint.

    Layers that only their tensors tell apart (bitsandbytes' in 4 bits have no shape without) are filled over memory
    maps: their pages are read when somebody looks at them.

    Attributes:
        model: the model.
        bare: those layers on the meta device, by path.
        quantizer: transformers' own, or None.
        dtype: of the model's floats.
        naming: where the checkpoint's tensors go.
        stored: by the path of the module, what the checkpoint has of it.
    """

    model: Any
    bare: Mapping[str, nn.Module]
    quantizer: Any
    dtype: torch.dtype
    naming: Naming
    stored: Mapping[str, tuple[Stored, ...]]

    @classmethod
    def of(cls, directory: CheckpointDirectory, maps: Maps) -> Skeleton:
        """Make it.

        Raises:
            MissingExtraError: transformers is not installed.
            FoldError: transformers does not know the model, or the checkpoint lacks a tensor of it or has it in another
                shape.
        """
        with quiet():
            model, quantizer, dtype = meta_model(directory)
            naming = Naming.of(model, quantizer, directory)
        _check(model, directory, naming)
        stored: dict[str, tuple[Stored, ...]] = {}
        for one in directory:
            path = module_path(model, naming.renamed[one.name])
            stored[path] = (*stored.get(path, ()), one)
        bare: dict[str, nn.Module] = {}
        made = cls(model, bare, quantizer, dtype, naming, stored)
        for path, own in stored.items():
            layer = model.get_submodule(path)
            if any(naming.how[t.name] == "format" for t in own):
                bare[path] = shell(layer)
                made.fill(Holder(model, {path: layer}), own, maps)
        return made

    def layer(self, path: str) -> nn.Module:
        """A layer of its own on the meta device."""
        return shell(self.bare[path] if path in self.bare else self.model.get_submodule(path))

    def fill(self, holder: Holder, stored: Iterable[Stored], maps: Maps) -> None:
        """Give a holder's layers their tensors."""
        self.fill_with(holder, {t.name: maps.tensor(t) for t in stored})

    def fill_with(self, holder: Holder, state: Mapping[str, Tensor]) -> None:
        """Give a holder's layers tensors, by their names in a checkpoint."""
        if all(self.naming.how.get(name, "plain") == "plain" for name in state) and self.quantizer is None:
            for name, tensor in state.items():
                put(holder, self.naming.renamed.get(name, name), tensor)
        else:
            load(holder, state, self.naming, self.quantizer, self.dtype)

    def sources(self, name: str) -> tuple[Stored, ...]:
        """What the checkpoint has of a parameter of the model, under any of its names."""
        for known in (name, *self.tied(name)):
            own = self.stored.get(module_path(self.model, known), ())
            if found := tuple(t for t in own if self.naming.renamed[t.name] == known):
                return found
        return ()

    def tied(self, name: str) -> tuple[str, ...]:
        """The other names of a parameter."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        own = parameters.get(name)
        return tuple(n for n, p in parameters.items() if p is own and n != name) if own is not None else ()


def shell(module: nn.Module) -> nn.Module:
    """A copy of a module, without hooks, with room of its own for parameters that are still those of the original.

    ``copy.deepcopy`` fails on quantized parameters that are on the meta device.
    """
    copied: nn.Module = object.__new__(type(module))
    for name, value in vars(module).items():
        vars(copied)[name] = type(value)() if name in HOOKS else value.copy() if isinstance(value, dict) else value
    copied._modules = {n: None if m is None else shell(m) for n, m in module._modules.items()}
    return copied


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer, without a cast."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    elif leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        raise FoldError(f"{name}: a {type(module).__name__} has no tensor {leaf!r}")


def _check(model: Any, directory: CheckpointDirectory, naming: Naming) -> None:
    """Every parameter of the model is in the checkpoint, and has its shape there."""
    here = dict(model.named_parameters(remove_duplicate=False))
    there = {naming.renamed[t.name]: t for t in directory}
    tied = ties(model)
    having = {id(p) for n, p in here.items() if n in there}
    lacking = [
        n for n, p in here.items() if id(p) not in having and tied.get(n) not in there and not may_lack(model, n)
    ]
    if lacking:
        raise FoldError(
            f"{directory.path}: there is no {lacking[0]}"
            + (f" and {len(lacking) - 1} more tensors" if lacking[1:] else "")
            + f", which a {type(model).__name__} has; is the checkpoint complete, and the config its own?"
        )
    for name, stored in there.items():
        plain = naming.how[stored.name] == "plain" and name in here and not _quantized(model, name)
        if plain and tuple(here[name].shape) != stored.shape:
            raise FoldError(
                f"{directory.path / stored.file}: {stored.name} has shape {list(stored.shape)}, a "
                f"{type(model).__name__} of this config has {list(here[name].shape)}"
            )


def _quantized(model: Any, name: str) -> bool:
    """Whether a parameter belongs to a layer that stores its weight in its own way; its shape may be another."""
    layer = model.get_submodule(name.rpartition(".")[0])
    known = format_of(layer)
    return known is None or not known.lossless
