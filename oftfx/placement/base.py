"""What every placement has in common: whose rotations act at a site, and where they live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn

from oftfx.errors import OftfxError
from oftfx.formats.base import WeightFormat
from oftfx.formats.exact import use_native
from oftfx.formats.registry import format_of
from oftfx.model.names import child_name
from oftfx.placement.aware import Aware, forget_aware, is_paused
from oftfx.placement.open import OPEN
from oftfx.rotation.frozen import FrozenRotation
from oftfx.rotation.module import Rotation


class SiteRotations(nn.Module):
    """The rotations that live at a site, one child an adapter. It only holds them; a `Placement` applies them.

    Args:
        placement: which one; it lets go of what it has computed when the model moves.
    """

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self.__dict__["_placement"] = placement

    def forward(self, *_: Any, **__: Any) -> Any:
        """Not meant to be called; a container like ModuleList."""
        raise OftfxError("an `oft` child only holds rotations; call the layer it belongs to")

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what torch.ao's eager quantization sets on every module before it replaces layers.

        It observes no layer that has children, and puts our hooks on the new layer without their keyword arguments.
        """
        if name == "qconfig" and value is not None:
            raise OftfxError(
                f"{self._placement.site}: torch.ao.quantization replaces layers without their rotations; fold first "
                "(oftfx.fold), then quantize what comes out"
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> SiteRotations:
        self._placement.forget()  # also of the weight beside it, which is moved after its children
        return super()._apply(fn, recurse)


class Placement(ABC):
    """The rotations of one site and how they act. Kept alive by the hooks it registers.

    Attributes:
        site: path of the site.
        module: the module that holds the weight.
        parameter: the weight's name there.
        fixed: rotations that a fold left in front of a quantized weight; they are the layer's own and act first.
        rotations: adapter name to rotation; one that lives here or, where sites share an input, at another site.
        active: names of the adapters that act, in order; names this site does not know are passed over.
        through: for adapters that are trained through their fold, what it will write; by their names, in order.
        ran: whether a hook has been called at all; a layer used other than by calling it never does that.
    """

    kind: str

    def __init__(self, site: str, module: nn.Module, *, parameter: str = "weight", format: WeightFormat | None = None):
        self.site, self.module, self.parameter, self.format = site, module, parameter, format
        self.fixed: list[FrozenRotation] = []
        self.rotations: dict[str, Rotation] = {}
        self.active: tuple[str, ...] = ()
        self.through: dict[tuple[str, ...], Aware] = {}
        self.ran = False

    @abstractmethod
    def register(self) -> None:
        """Let the hooks act from now on."""

    @property
    @abstractmethod
    def reader(self) -> nn.Module:
        """The module that the hooks are on."""

    def remove(self) -> None:
        """Take the hooks away, and a forward that was exchanged for the sake of the rotations."""
        use_native(self.module)
        reader = self.reader
        for hooks, *flags in (
            (reader._forward_pre_hooks, reader._forward_pre_hooks_with_kwargs),
            (reader._forward_hooks, reader._forward_hooks_with_kwargs, reader._forward_hooks_always_called),
        ):
            for key in [k for k, h in hooks.items() if owner_of(h) is self]:
                for registered in (hooks, *flags):
                    registered.pop(key, None)

    def note_run(self) -> None:
        """Remember that a hook was called; a trace must not write to objects that outlive it."""
        if not torch.compiler.is_compiling():
            self.ran = True

    def in_effect(self, names: Iterable[str] | None = None) -> list[Rotation | FrozenRotation]:
        """The rotations that act now, or with these adapters, in order."""
        names = self.active if names is None else names
        return [*self.fixed, *(self.rotations[n] for n in names if n in self.rotations)]

    def fold_in_effect(self) -> Aware | None:
        """What the site computes with instead of its rotations: the fold that the adapters which act are trained for.

        Rows of a batch with adapters of their own are served unfolded.
        """
        if not self.through or self.fixed or OPEN.any or is_paused():
            return None
        return self.through.get(self.active)

    def alone(self, x: torch.Tensor, names: Iterable[str] | None = None) -> torch.Tensor:
        """``x @ R1 @ R2 ...`` of what acts here, or of these adapters, whatever else reads ``x``."""
        for rotation in self.in_effect(names):
            x = rotation(x)
        return x

    def forget(self) -> None:  # noqa: B027  (most keep nothing)
        """Drop what is kept from one forward to the next; also to be called when other rotations take a name."""

    def weight_format(self) -> WeightFormat | None:
        """The format that reads the weight now; None where none does."""
        return self.format or format_of(self.module)

    @property
    def each(self) -> bool:
        """Whether every expert of the layer has a rotation of its own."""
        return self.format is not None and self.format.layout(self.module).each

    @property
    def child(self) -> str:
        """Name of the holder's child that keeps the rotations."""
        return child_name(self.parameter)

    @property
    def holder(self) -> nn.Module | None:
        """The child module that keeps the rotations, or None where another site does."""
        return self.module._modules.get(self.child)

    def hold(self, name: str, rotation: nn.Module) -> None:
        """Make a rotation a child of the site: ``<site>.oft.<adapter>``."""
        holder = self.holder
        if holder is None:
            holder = SiteRotations(self).train(self.module.training)
            self.module.add_module(self.child, holder)
        elif not isinstance(holder, SiteRotations):
            raise OftfxError(f"{self.site} already has a child called {self.child!r} that is not ours")
        holder.add_module(name, rotation.train(self.module.training))

    def settle(self, fixed: Iterable[FrozenRotation]) -> None:
        """Let fixed rotations act instead of every adapter; the hooks stay where they are."""
        self._clear(None)
        self.fixed = list(fixed)
        if not self.fixed:
            self.remove()

    def drop(self, adapter: str | None = None) -> None:
        """Remove one adapter's rotation, or all and the fixed ones; hooks and holder once nothing is left."""
        self._clear(adapter)
        if not self.rotations and not self.fixed:
            self.remove()

    def _clear(self, adapter: str | None) -> None:
        forget_aware(self, adapter)
        if adapter is None:
            self.rotations.clear()
            self.fixed.clear()
        else:
            self.rotations.pop(adapter, None)
        self.active = tuple(n for n in self.active if n in self.rotations)
        self.forget()
        holder = self.holder
        if isinstance(holder, SiteRotations):
            for name in [adapter] if adapter else list(holder._modules):
                holder._modules.pop(name, None)
            if not holder._modules:
                del self.module._modules[self.child]


def owner_of(hook: Any) -> Placement | None:
    """The placement that a registered hook belongs to, or None."""
    owner = getattr(hook, "__self__", hook)
    return owner if isinstance(owner, Placement) else None
