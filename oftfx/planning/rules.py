"""What a user asks for: a `Rule` says where to rotate, its `OFT` says how."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn as nn

from oftfx.errors import RuleError
from oftfx.model.site import Site
from oftfx.planning.patterns import compiled
from oftfx.rotation.spec import OFT

_LONGEST = 2000
"""Characters of a target: `fnmatch` takes seconds for thousands of ``[``."""
Target = str | type[nn.Module] | Callable[[Site], bool]


@dataclass(frozen=True)
class Rule:
    """Where to rotate, and how.

    Args:
        target: an fqn glob (``*`` also crosses dots), ``"re:<regex>"`` (matches the whole path), a module class,
            ``"all-linear"`` (every linear layer but the output head), or a predicate on a `Site`.
        spec: an `OFT`, or None to exclude what matches.
        optional: matching nothing is then no error.

    Raises:
        RuleError: the target is none of these or not a regular expression, or the spec is no `OFT`.

    Examples:
        >>> import oftfx, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 4))
        >>> rules = [oftfx.Rule("1", None), oftfx.Rule(torch.nn.Linear, oftfx.OFT(3))]
        >>> [site.fqn for site in oftfx.plan(model, rules)]
        ['0']
    """

    target: Target
    spec: OFT | None
    optional: bool = False

    def __post_init__(self) -> None:
        if self.spec is not None and not isinstance(self.spec, OFT):
            raise RuleError(f"Rule({self.label!r}): spec must be an OFT or None, got {type(self.spec).__name__}")
        if isinstance(self.target, str) and len(self.target) > _LONGEST:
            raise RuleError(
                f"Rule({self.target[:60]!r}...): {len(self.target):,} characters, expected {_LONGEST:,} at most"
            )
        if isinstance(self.target, str) and self.target.startswith("re:"):
            try:
                compiled(self.target[3:])
            except re.error as error:
                raise RuleError(f"Rule({self.target[:200]!r}): not a regular expression to be used: {error}") from None
        elif not (isinstance(self.target, (str, type)) or callable(self.target)):
            raise RuleError(f"Rule target must be a glob, 're:...', a module class or a predicate, got {self.target!r}")

    @property
    def label(self) -> str:
        """The target as text."""
        if isinstance(self.target, str):
            return self.target
        return getattr(self.target, "__qualname__", repr(self.target))

    def matches(self, site: Site, module: nn.Module) -> bool:
        """Whether the rule reaches this site (``module`` is the layer itself)."""
        if isinstance(self.target, type):
            return isinstance(module, self.target)
        if callable(self.target):
            return bool(self.target(site))
        if self.target == "all-linear":
            return site.is_linear and not site.is_head
        return any(map(self.matches_name, (site.fqn, *site.aliases)))

    def matches_name(self, fqn: str) -> bool:
        """Whether a textual target matches a module path."""
        if not isinstance(self.target, str) or self.target == "all-linear":
            return False
        if self.target.startswith("re:"):
            return compiled(self.target[3:]).fullmatch(fqn) is not None
        return fnmatch.fnmatchcase(fqn, self.target)
