"""Which modules a PEFT configuration means. Verified against peft 0.21.2."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from oftfx.errors import RuleError, warn
from oftfx.model.index import ModelIndex
from oftfx.model.structure import is_own_module
from oftfx.planning.patterns import compiled

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""What PEFT adds to ``modules_to_save`` for a task; a model need not have all of them."""


@dataclass(frozen=True)
class Selection:
    """PEFT's rules for one module path: what is excluded or trains whole is no target, then targets, then layers.

    Attributes:
        target: a regular expression for the whole path, or paths and last parts of paths.
        exclude: the same; empty for nothing.
        whole: names of modules that train whole; nothing inside them is a target.
        layers: numbers of layers; only targets named by their last part are asked for theirs. Empty for all.
        patterns: what stands before such a number, as a regular expression; empty for anything.
    """

    target: str | frozenset[str]
    exclude: str | frozenset[str]
    whole: tuple[str, ...]
    layers: frozenset[int]
    patterns: tuple[str, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Selection:
        """Of the fields of a configuration."""
        layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
        return cls(
            _names(config.get("target_modules")),
            _names(config.get("exclude_modules")),
            saved_names(config),
            frozenset([layers] if isinstance(layers, int) else layers or ()),
            (pattern,) if isinstance(pattern, str) and pattern else tuple(pattern or ()),
        )

    @property
    def is_all_linear(self) -> bool:
        """Whether the target is a word for every linear layer, of which classes decide."""
        return isinstance(self.target, str) and self.target.lower() == "all-linear"

    def excludes(self, fqn: str) -> bool:
        """Whether a path can be no target."""
        if self.exclude and named(self.exclude, fqn):
            return True
        return any(_matches(rf"(^|.*\.){name}($|\..*)", fqn) for name in self.whole)

    def selects(self, fqn: str) -> bool:
        """Whether a path is a target."""
        if self.excludes(fqn) or not named(self.target, fqn):
            return False
        by_itself = isinstance(self.target, str) or fqn in self.target
        return by_itself or not self.layers or self._layer(fqn) in self.layers

    def _layer(self, fqn: str) -> int | None:
        """The first number in a path that follows a pattern; without one, after a part that is not the first."""
        for search in [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in self.patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            if found := _matches(search, fqn):
                return int(found["idx"])
        return None


def named(wanted: str | Iterable[str], fqn: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds paths or their last parts."""
    if isinstance(wanted, str):
        return _matches(wanted, fqn, whole=True) is not None
    return any(fqn == w or fqn.endswith(f".{w}") for w in wanted)


def saved_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Ends of the paths of the modules that train whole: those that are named, and the task's heads."""
    return tuple(dict.fromkeys((*(config.get("modules_to_save") or ()), *_heads(config))))


def whole_modules(config: Mapping[str, Any], index: ModelIndex, *, loading: bool = False) -> tuple[str, ...]:
    """Paths of the modules that train whole: PEFT takes each whose path ends with a name, in the middle of a word too.

    Args:
        config: the fields of a configuration.
        index: the model.
        loading: the names come with a file, which shows itself what it holds.

    Raises:
        RuleError: a name that no path ends with. PEFT passes over it.
    """
    paths = {p: every[0] for module, every in index.paths.items() if not is_own_module(module) for p in every}
    found: dict[str, None] = {}
    heads = _heads(config)
    missing = []
    for name in saved_names(config):
        ends = [first for path, first in paths.items() if path.endswith(name)]
        found.update(dict.fromkeys(ends))
        if not ends and name not in heads:
            missing.append(name)
    if missing and not loading:
        raise RuleError(
            f"modules_to_save: no module of {type(index.model).__name__} has a path that ends with {missing[0]!r}; "
            "leave it out, or name what trains whole"
        )
    if heads and not loading and not any(path.endswith(heads) for path in found):
        warn(
            f"task_type={_task(config)!r}: {type(index.model).__name__} has no module called "
            f"{' or '.join(map(repr, heads))}, so no head trains whole; name it in modules_to_save"
        )
    return tuple(found)


def _heads(config: Mapping[str, Any]) -> tuple[str, ...]:
    return HEADS.get(_task(config), ())


def _task(config: Mapping[str, Any]) -> str:
    task = config.get("task_type")
    return str(getattr(task, "value", task))


def _names(value: Any) -> str | frozenset[str]:
    return value if isinstance(value, str) else frozenset(value or ())


def _matches(pattern: str, fqn: str, *, whole: bool = False) -> re.Match[str] | None:
    try:
        expression = compiled(pattern)
        return expression.fullmatch(fqn) if whole else expression.match(fqn)
    except re.error as error:
        shown = repr(pattern[:200])
        raise RuleError(f"the PEFT configuration asks for {shown}, no regular expression to be used: {error}") from None
