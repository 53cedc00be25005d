"""Read every accepted form of rules: objects, a mapping, names, a TOML file, a PEFT configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oftfx.errors import RuleError
from oftfx.model.index import ModelIndex
from oftfx.planning.from_peft import fields_of, rules_from_config, trained_by_config
from oftfx.planning.peft_fields import check_fields
from oftfx.planning.rules import Rule
from oftfx.rotation.spec import OFT
from oftfx.typed_json import parsed

Rules = Rule | Sequence[Rule] | Sequence[str] | Mapping[Any, "OFT | None"] | str | Path


@dataclass(frozen=True)
class Asked:
    """What a user asks for, whatever it was said with.

    Attributes:
        rules: the first that matches a site wins.
        train: names or globs of further modules that train whole.
        train_bias: the biases that do: ``"none"``, ``"all"`` or ``"oft"``.
    """

    rules: tuple[Rule, ...]
    train: tuple[str, ...] = ()
    train_bias: str = "none"

    @property
    def specs(self) -> tuple[OFT, ...]:
        """Of the rules that rotate."""
        return tuple(r.spec for r in self.rules if r.spec is not None)


def asked_for(rules: Rules | Any, index: ModelIndex, train: Sequence[str] = (), train_bias: str = "none") -> Asked:
    """Rules with what trains besides; a PEFT ``OFTConfig`` says that too (``modules_to_save``, ``bias``).

    Args:
        rules: see `read_rules`; or a live ``OFTConfig``, or the path of an ``adapter_config.json``.
        index: of the model.
        train: further modules that train whole.
        train_bias: biases that train.

    Raises:
        RuleError: see `read_rules`.
    """
    if isinstance(rules, (str, Path)) and str(rules).endswith(".json"):
        config = _read_config(Path(rules))
    elif getattr(rules, "peft_type", None) is None:
        return Asked(read_rules(rules), tuple(train), train_bias)
    else:
        config = fields_of(rules, index.model)
    own, bias = trained_by_config(config, index)
    return Asked(rules_from_config(config, index), (*train, *own), bias if train_bias == "none" else train_bias)


def trains(rules: Rules | Any) -> bool:
    """Whether what is asked for is to train; a PEFT ``OFTConfig`` with ``inference_mode=True`` says no."""
    return not getattr(rules, "inference_mode", False)


def read_rules(rules: Rules | Any) -> tuple[Rule, ...]:
    """Bring every form of ``rules`` that says itself what it means to a tuple of `Rule`; the first that matches wins.

    Args:
        rules: a `Rule`, a sequence of them, a mapping ``{target: OFT | None}``, ``"all-linear"``, names of layers as in
            PEFT's ``target_modules`` (``["q_proj", "v_proj"]``, each the end of a path), or the path of a TOML file
            with ``[[rule]]`` tables (``target``, optional ``optional``, ``exclude = true`` or the fields of `OFT`). For
            a PEFT ``OFTConfig``, whose meaning depends on the model, see `asked_for`.

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
    elif isinstance(rules, Sequence) and not isinstance(rules, str) and rules and isinstance(rules[0], str):
        result = tuple(Rule(target, OFT()) for target in names_of(",".join(map(str, rules))))
    elif isinstance(rules, Sequence) and not isinstance(rules, str):
        if wrong := [r for r in rules if not isinstance(r, Rule)]:
            raise RuleError(f"a list of rules holds Rule objects, got {wrong[0]!r}")
        result = tuple(r for r in rules if isinstance(r, Rule))
    else:
        raise RuleError(
            f"rules: got {rules!r}; expected a Rule, a list of Rules or of names, a mapping {{target: OFT(...) or "
            "None}, 'all-linear', a PEFT OFTConfig, or the path of a .toml file or an adapter_config.json"
        )
    if not result:
        raise RuleError("rules: empty, nothing would be rotated; 'all-linear' is a good start")
    return result


def names_of(text: str) -> list[str]:
    """Targets of ``"q_proj,v_proj"``: names as in PEFT, the ends of paths; globs and ``all-linear`` as they are.

    Raises:
        RuleError: there is none.
    """
    names = [n.strip() for n in text.split(",") if n.strip()]
    if not names:
        raise RuleError(f"target: {text!r} names no layer")
    return [n if n == "all-linear" or set(n) & set("*?[:") else rf"re:(.*\.)?{re.escape(n)}" for n in names]


def _read_config(path: Path) -> dict[str, Any]:
    """A PEFT configuration as rules."""
    try:
        config = parsed(path.read_text(encoding="utf-8"))
        kind, targets = config.get("peft_type"), config.get("target_modules")
    except (OSError, ValueError, AttributeError) as error:
        raise RuleError(f"rules: {path} cannot be read as PEFT's configuration: {error}") from None
    if kind != "OFT" or not targets:
        raise RuleError(f"rules: {path}: expected peft_type 'OFT' with target_modules, found {kind!r} with {targets!a}")
    check_fields(config, f"rules: {path}", RuleError)
    return dict(config)


def _read_toml(path: Path) -> tuple[Rule, ...]:
    import tomllib

    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except FileNotFoundError:
        raise RuleError(f"rules: no file {path}") from None
    except (OSError, ValueError, RecursionError) as error:
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
        if not isinstance(optional, bool) or not isinstance(excluded, bool) or not isinstance(target, str):
            raise RuleError(f"rules: {path}: target is a text, optional and exclude are true or false: {table}")
        result.append(Rule(target, None if excluded else OFT.from_dict(fields), optional=optional))
    return tuple(result)
