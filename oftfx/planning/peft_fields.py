"""What kinds of values PEFT writes into the fields of its configurations, and what to say of others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oftfx.errors import OftfxError


def check_fields(config: Mapping[str, Any], where: str, error: type[OftfxError]) -> None:
    """Raise ``error`` for a field of PEFT's configuration with a value of a kind that PEFT does not write."""
    for name, value in config.items():
        kinds, words = _FIELDS.get(name, ((object,), ""))
        plain = tuple(k for k in kinds if k is not list)
        each = value if isinstance(value, list) and list in kinds else [value]
        if value is not None and not all(_is_one(v, plain) for v in each):
            raise error(f"{where}: {name} is {ascii(value)[:200]}, expected {words}")


def _is_one(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (not isinstance(value, bool) or int not in kinds)


_NAMES = ((str, list), "names, or a regular expression")
_FIELDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"), _NAMES),
    **dict.fromkeys(("bias", "peft_version", "task_type"), ((str,), "a string")),
    **dict.fromkeys(("r", "oft_block_size", "num_cayley_neumann_terms"), ((int,), "an integer")),
    **dict.fromkeys(("eps", "module_dropout"), ((int, float), "a number")),
    **dict.fromkeys(("coft", "block_share", "use_cayley_neumann", "apply_GS"), ((bool,), "true or false")),
    "layers_to_transform": ((int, list), "numbers of layers"),
}
