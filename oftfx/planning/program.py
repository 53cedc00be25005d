"""What passes work on: a model, the sites in it, and what is known about its program."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch.nn as nn

from oftfx.model.site import Site
from oftfx.model.sites import Finder

if TYPE_CHECKING:
    from oftfx.planning.plans import Plan
    from oftfx.trace.record import Recording


@dataclass(frozen=True)
class Program:
    """A model and what is known about it. Passes return new programs; the model inside may be changed by them.

    Attributes:
        model: the module itself.
        sites: every weight that can be rotated, in the order of ``named_modules``.
        plan: which of them are rotated and how; None before rules are resolved.
        recording: the recorded program, or None where none was asked for.
        refused: weights that cannot be sites, by path, with the reason.
    """

    model: nn.Module
    sites: tuple[Site, ...]
    plan: Plan | None = None
    recording: Recording | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, recording: Recording | None = None) -> Program:
        """The program of a model, its sites found in the module tree."""
        finder = Finder(model)
        return cls(model, tuple(finder.layers()), recording=recording, refused=finder.refused)

    def renewed(self) -> Program:
        """The same program of a model that has changed: its sites as they are now."""
        return replace(self, sites=Program.of(self.model).sites)

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
            hooks = [id(h) for group in (module._forward_pre_hooks, module._forward_hooks) for h in group.values()]
            digest.update(repr((name, id(module), type(module).__qualname__, tensors, hooks)).encode())
        digest.update(repr((self.sites, self.plan, dict(self.refused))).encode())
        return digest.hexdigest()
