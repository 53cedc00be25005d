"""What a convention is: how its file is known, what it means, and how it is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch.nn as nn
from torch import Tensor

from oftfx.adapter.conventions.source import Source
from oftfx.errors import AdapterError, AdapterFileError
from oftfx.model.site import Site
from oftfx.planning.plans import Plan
from oftfx.rotation.module import Rotation
from oftfx.rotation.spec import OFT


@dataclass(frozen=True)
class Turn:
    """What a file says of one layer.

    Attributes:
        spec: how the skew becomes a rotation.
        skew: ``(rows, b (b - 1) / 2)``, float32 or float64.
        side: ``"input"``: ``W' = diag(scale) (W diag(signs)) R^T``; ``"output"``:
            ``W' = diag(scale) R^T (diag(signs) W)``.
        signs: of the rotated axis, where a file has reflections; None for none.
        scale: of the rows, ``(out,)``; None for none. Where there are signs or scales, the adapter gets a weight of its
            own.
    """

    spec: OFT
    skew: Tensor
    side: Literal["input", "output"] = "input"
    signs: Tensor | None = None
    scale: Tensor | None = None

    @property
    def has_own_weight(self) -> bool:
        """Whether a rotation alone does not say it."""
        return self.signs is not None or self.scale is not None


@dataclass(frozen=True)
class Contents:
    """What a file says.

    Attributes:
        turns: by the path of the layer.
        others: whole parameters and buffers by name.
        config: PEFT's configuration, which says what those are.
        remarks: what a user should know.
        unbounded: what training from here on does not keep, in words; empty for nothing.
    """

    turns: Mapping[str, Turn]
    others: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    unbounded: str = ""


@dataclass(frozen=True)
class Target:
    """The model that a file is read for.

    Attributes:
        model: name of its class, for messages.
        sites: its layers by path.
        modules: their modules by path.
        part: the prefix of the keys that are meant, where a file is of several models; None to find out.
    """

    model: str
    sites: Mapping[str, Site]
    modules: Mapping[str, nn.Module]
    part: str | None = None


@dataclass(frozen=True)
class Outgoing:
    """An adapter that is to be written.

    Attributes:
        root: its model.
        plan: its plan.
        rotations: by the path of the site.
        weights: for sites with a weight of their own, that and the base's, by the path of the site.
        part: what is to stand before the paths in a file of several models; None for the usual.
    """

    root: nn.Module
    plan: Plan
    rotations: Mapping[str, Rotation]
    weights: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    part: str | None = None


@dataclass(frozen=True)
class Written:
    """What a file is to hold: tensors, metadata, and ``adapter_config.json`` where the convention has one."""

    tensors: Mapping[str, Tensor]
    notes: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


class Convention(ABC):
    """One meaning of adapter files.

    Attributes:
        name: the word for it.
        made_by: who writes such files.
    """

    name: ClassVar[str]
    made_by: ClassVar[str]

    @abstractmethod
    def recognizes(self, source: Source) -> bool:
        """Whether the file can be of this convention, by names, shapes and notes."""


class Foreign(Convention):
    """A convention of another tool, which is read as skews of our rotations and written from them.

    Attributes:
        is_directory: whether it is written as a directory with a configuration, or as one file.
        read_only: why it is not written; empty where it is.
    """

    is_directory: ClassVar[bool] = False
    read_only: ClassVar[str] = ""

    @abstractmethod
    def read(self, source: Source, target: Target) -> Contents:
        """What it means for a model.

        Raises:
            AdapterError: it does not fit the model.
            AdapterFileError: something in it cannot be said here, by name.
        """

    def write(self, adapter: Outgoing) -> Written:
        """Say an adapter in this convention.

        Raises:
            AdapterError: the convention cannot say it.
        """
        raise AdapterError(
            f"convention {self.name!r} is read only: {self.read_only}. The rotations of these {len(adapter.plan)} "
            "layers can be written as convention='peft'"
        )


def only(source: Source, known: Sequence[str], convention: str) -> None:
    """Refuse keys that end with nothing known: what is not read would be lost.

    Raises:
        AdapterFileError: there is one.
    """
    if other := next((k for k in source.heads if not k.endswith(tuple(known))), None):
        raise AdapterFileError(
            f"{source.named(other)} is nothing that convention {convention!r} knows ({', '.join(known)}), and would be "
            "lost. A file that mixes kinds of adapters cannot be loaded as rotations"
        )


def check_shape(source: Source, key: str, site: Site, length: int, *, dims: int) -> None:
    """Compare the shape of blocks ``(..., k, b, b)`` in a header with the axis that they rotate.

    Raises:
        AdapterFileError: they do not fit.
    """
    shape = source.heads[key].shape
    if len(shape) != dims or shape[-1] != shape[-2] or shape[-3] * shape[-1] != length:
        raise AdapterFileError(
            f"{source.named(key)} has shape {shape}; {site.fqn} needs blocks (k, b, b) with k * b = {length}"
            + (", one set a factor" if dims == 4 else "")
            + ". Is it an adapter of another model?"
        )
