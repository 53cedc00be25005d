"""What passes work on: a model, the sites in it, and what is known about its program."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from oftfx.formats import format_of
from oftfx.structure import is_own_module

if TYPE_CHECKING:
    from oftfx.plans import Plan
    from oftfx.trace.record import Recording


@dataclass(frozen=True)
class Site:
    """One layer whose input can be rotated.

    Attributes:
        fqn: module path in the model.
        kind: ``"linear"``.
        format: how the weight is stored, a name in `oftfx.formats.formats`.
        module_class: class name of the layer.
        in_features: length of the rotated axis.
        out_features: rows of the weight matrix.
        dtype: float dtype of the weight, as text.
        tied: other paths of the same weight tensor.
        aliases: other paths of the same layer; rules may name any.
        is_head: the model's output layer; ``"all-linear"`` leaves it alone.
    """

    fqn: str
    kind: str
    format: str
    module_class: str
    in_features: int
    out_features: int
    dtype: str
    tied: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    is_head: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether ``"all-linear"`` means this kind of layer."""
        return self.kind == "linear"


@dataclass(frozen=True)
class Program:
    """A model and what is known about it. Passes return new programs; the model inside may be changed by them.

    Attributes:
        model: the module itself.
        sites: every layer that can be rotated, in the order of ``named_modules``.
        plan: which of them are rotated and how; None before rules are resolved.
        recording: the recorded program, or None where none was asked for.
    """

    model: nn.Module
    sites: tuple[Site, ...]
    plan: Plan | None = None
    recording: Recording | None = None

    @classmethod
    def of(cls, model: nn.Module, recording: Recording | None = None) -> Program:
        """The program of a model, its sites found in the module tree."""
        return cls(model, find_sites(model), recording=recording)

    def with_(self, **changes: Any) -> Program:
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def fingerprint(self) -> str:
        """Hash of everything a pass may change: plan, module tree, identity of parameters, buffers and hooks.

        Two equal fingerprints mean that a pass changed nothing; used to check what passes say of themselves.
        """
        digest = hashlib.sha256()
        for name, module in self.model.named_modules(remove_duplicate=False):
            tensors = [(k, id(v)) for group in (module._parameters, module._buffers) for k, v in group.items()]
            hooks = [id(h) for h in module._forward_pre_hooks.values()]
            digest.update(repr((name, id(module), type(module).__qualname__, tensors, hooks)).encode())
        digest.update(repr((self.sites, self.plan)).encode())
        return digest.hexdigest()


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every layer of ``model`` that some weight format can read, each module once."""
    head = output_head(model)
    names = _weight_names(model)
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    sites = []
    for fqn, module in model.named_modules():
        weight_format = format_of(module)
        if weight_format is None or fqn == "" or is_own_module(module):
            continue
        shape = weight_format.geometry(module)
        weight = module._parameters.get("weight")
        own = {f"{path}.weight" for path in paths[module]}
        tied = tuple(n for n in names.get(id(weight), ()) if n not in own) if weight is not None else ()
        sites.append(
            Site(
                fqn=fqn,
                kind=shape.kind,
                format=weight_format.name,
                module_class=type(module).__name__,
                in_features=shape.in_features,
                out_features=shape.out_features,
                dtype=str(weight_format.dtype(module)).removeprefix("torch."),
                tied=tied,
                aliases=tuple(p for p in paths[module] if p != fqn),
                is_head=module is head,
            )
        )
    return tuple(sites)


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that a transformers model names as its output embedding."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        return getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):  # models without a head
        return None


def _weight_names(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def weight_device(module: nn.Module) -> torch.device:
    """Where a layer lives: the device of its first parameter or buffer."""
    for group in (module._parameters, module._buffers):
        for tensor in group.values():
            if tensor is not None:
                return tensor.device
    return torch.device("cpu")
