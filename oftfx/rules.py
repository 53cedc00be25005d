"""What a user asks for: a `Rule` says where to rotate, its `OFT` says how."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn as nn

from oftfx.errors import RuleError
from oftfx.rotation.spec import OFT

if TYPE_CHECKING:
    from oftfx.model.site import Site

Target = str | type[nn.Module] | Callable[["Site"], bool]


@dataclass(frozen=True)
class Rule:
    """Where to rotate, and how.

    Args:
        target: an fqn glob (``*`` also crosses dots), ``"re:<regex>"`` (matches the whole path), a module class,
            ``"all-linear"`` (every linear layer but the output head), or a predicate on a `Site`.
        spec: an `OFT`, or None to exclude what matches.
        optional: matching nothing is then no error.
    """

    target: Target
    spec: OFT | None
    optional: bool = False

    def __post_init__(self) -> None:
        if self.spec is not None and not isinstance(self.spec, OFT):
            raise RuleError(f"Rule({self.label!r}): spec must be an OFT or None, got {type(self.spec).__name__}")
        if isinstance(self.target, str) and self.target.startswith("re:"):
            try:
                re.compile(self.target[3:])
            except re.error as error:
                raise RuleError(f"Rule({self.target!r}): not a regular expression: {error}") from None
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
            return re.fullmatch(self.target[3:], fqn) is not None
        return fnmatch.fnmatchcase(fqn, self.target)


Rules = Rule | Sequence[Rule] | Mapping[Any, "OFT | None"] | str | Path


def read_rules(rules: Rules | Any) -> tuple[Rule, ...]:
    """Bring every accepted form of ``rules`` to a tuple of `Rule`; the first that matches a site wins.

    Args:
        rules: a `Rule`, a sequence of them, a mapping ``{target: OFT | None}``, ``"all-linear"``, a PEFT
            ``OFTConfig``, or the path of a TOML file with ``[[rule]]`` tables (``target``, optional ``optional``,
            ``exclude = true`` or the fields of `OFT`).

    Raises:
        RuleError: any other type, an empty list, a file that is missing or malformed.
    """
    if isinstance(rules, Rule):
        return (rules,)
    if isinstance(rules, Mapping):
        result = tuple(Rule(target, spec) for target, spec in rules.items())
    elif isinstance(rules, str) and rules == "all-linear":
        return (Rule("all-linear", OFT()),)
    elif isinstance(rules, Path) or (isinstance(rules, str) and rules.endswith(".toml")):
        result = _read_toml(Path(rules))
    elif getattr(rules, "peft_type", None) is not None:
        from oftfx.adapter.peft import rules_from_config

        return rules_from_config(rules)
    elif isinstance(rules, Sequence) and not isinstance(rules, str):
        if wrong := [r for r in rules if not isinstance(r, Rule)]:
            raise RuleError(f"a list of rules holds Rule objects, got {wrong[0]!r}")
        result = tuple(r for r in rules if isinstance(r, Rule))
    else:
        raise RuleError(
            f"rules: got {rules!r}; expected a Rule, a list of Rules, a mapping {{target: OFT(...) or None}}, "
            "'all-linear', a PEFT OFTConfig or the path of a .toml file"
        )
    if not result:
        raise RuleError("rules: empty, nothing would be rotated; 'all-linear' is a good start")
    return result


def _read_toml(path: Path) -> tuple[Rule, ...]:
    import tomllib

    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except FileNotFoundError:
        raise RuleError(f"rules: no file {path}") from None
    except tomllib.TOMLDecodeError as error:
        raise RuleError(f"rules: {path} is not TOML: {error}") from None
    tables = document.get("rule")
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise RuleError(f"rules: {path}: expected [[rule]] tables, found {', '.join(document) or 'nothing'}")
    result = []
    for table in tables:
        fields = dict(table)
        if "target" not in fields:
            raise RuleError(f"rules: a [[rule]] in {path} has no target: {table}")
        target, optional = fields.pop("target"), fields.pop("optional", False)
        excluded = fields.pop("exclude", False)
        result.append(Rule(target, None if excluded else OFT.from_dict(fields), optional=optional))
    return tuple(result)
