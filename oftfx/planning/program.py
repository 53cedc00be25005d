"""What passes work on: a model, the sites in it, and what is known about its program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch.nn as nn

from oftfx.errors import PassError
from oftfx.model.compressed import check_not_offloaded
from oftfx.model.index import ModelIndex
from oftfx.model.site import Site
from oftfx.model.sites import Finder
from oftfx.planning.plans import Plan
from oftfx.trace.record import Recording


@dataclass(frozen=True)
class Program:
    """A model and what is known about it. Passes return new programs; the model inside may be changed by them.

    Attributes:
        model: the module itself.
        index: what stands where in it.
        sites: every weight that can be rotated, in the order of ``named_modules``.
        plan: which of them are rotated and how; None before rules are resolved.
        recording: the recorded program, or None where none was asked for.
        refused: weights that cannot be sites, by path, with the reason.

    Examples:
        >>> import oftfx, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(11, 6), torch.nn.Linear(6, 4))
        >>> [(site.fqn, site.kind, site.in_features) for site in oftfx.Program.of(model).sites]
        [('0', 'embedding', 6), ('1', 'linear', 6)]
    """

    index: ModelIndex = field(repr=False)
    sites: tuple[Site, ...]
    plan: Plan | None = None
    recording: Recording | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module | ModelIndex, recording: Recording | None = None) -> Program:
        """The program of a model, its sites found in the module tree."""
        index = ModelIndex.of(model)
        check_not_offloaded(index.model)
        finder = Finder(index)
        return cls(index, tuple(finder.layers()), recording=recording, refused=finder.refused)

    @property
    def model(self) -> nn.Module:
        """The module itself."""
        return self.index.model

    @property
    def planned(self) -> Plan:
        """The plan.

        Raises:
            PassError: there is none yet.
        """
        if self.plan is None:
            raise PassError("there is no plan yet; run MatchRules first")
        return self.plan

    def renewed(self) -> Program:
        """The same program of a model whose modules have changed: its sites as they are now."""
        return replace(Program.of(self.model, self.recording), plan=self.plan)

    def with_(self, **changes: Any) -> Program:
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def fingerprint(self) -> tuple[Any, ...]:
        """Everything a pass may change: plan, module tree, identity of parameters, buffers and hooks.

        Two equal fingerprints mean that a pass changed nothing; used to check what passes say of themselves.
        """
        tree = tuple(
            (
                name,
                id(module),
                type(module),
                tuple((k, id(v)) for k, v in module._parameters.items()),
                tuple((k, id(v)) for k, v in module._buffers.items()),
                tuple(map(id, module._forward_pre_hooks.values())),
                tuple(map(id, module._forward_hooks.values())),
            )
            for name, module in self.model.named_modules(remove_duplicate=False)
        )
        return tree, self.sites, self.plan, dict(self.refused)
