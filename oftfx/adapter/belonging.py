"""Tell whether the two files of an adapter were written together: the weights know what their configuration means."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oftfx.errors import AdapterFileError
from oftfx.planning.from_peft import spec_from_config

KEY = "oftfx_config_sha256"
"""In the metadata of the weights; PEFT does not look at it, and its own files have none."""

# What decides which sites rotate and how. A base model's name, a task or a revision may be edited.
_FIELDS = (
    "bias",
    "block_share",
    "coft",
    "eps",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "num_cayley_neumann_terms",
    "oft_block_size",
    "r",
    "target_modules",
    "use_cayley_neumann",
)


def digest_of(config: Mapping[str, Any]) -> str:
    """SHA-256 of what a PEFT configuration, or a plan as JSON, means; order and layout of the text do not count."""
    if "peft_type" in config:
        chosen = {name: _plain(config.get(name)) for name in _FIELDS}
        chosen["series"] = spec_from_config(config).parameterization
    else:
        chosen = dict(config)
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def check_belongs(notes: Mapping[str, str], config: Mapping[str, Any], weights: Path, side: str) -> None:
    """Refuse a configuration that is not the one the weights were written with.

    Args:
        notes: metadata of the weights; without a digest, as PEFT writes them, they go with any configuration.
        config: the configuration or the plan.
        weights: their file, for the message.
        side: the other file's name.

    Raises:
        AdapterFileError: the two are of different saves, or one was edited.
    """
    if notes.get(KEY, digest := digest_of(config)) != digest:
        raise AdapterFileError(
            f"{weights.parent}: {side} is not the one that {weights.name} was written with: the files are of two "
            "saves, or what it says of sites or rotations was edited. Take both files from one save, or save again"
        )


def _plain(value: Any) -> Any:
    """PEFT writes sets as lists in any order, and an absent list as null or empty."""
    return sorted(map(str, value)) or None if isinstance(value, (list, tuple)) else value
