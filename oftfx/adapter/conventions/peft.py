"""What `oftfx.adapter.from_file` reads and `save_adapter` writes: PEFT's OFT of today and of 0.16/0.17, and our own.

PEFT 0.16 and 0.17 meant another series under the same key. From 0.18 on the configuration has PEFT's version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oftfx.adapter.conventions.base import Convention
from oftfx.adapter.conventions.source import Source
from oftfx.adapter.peft_files import EMBEDDING_SKEW, PREFIX, SKEW, WEIGHT_FILE
from oftfx.errors import AdapterError, AdapterFileError
from oftfx.planning.from_peft import spec_from_config


@dataclass(frozen=True)
class Native(Convention):
    """One of the three; its files are read with all that a configuration or a plan says."""

    name: str  # type: ignore[misc]
    made_by: str  # type: ignore[misc]

    def recognizes(self, source: Source) -> bool:
        """By PEFT's prefix and key, and by what stands beside the file."""
        if source.has_plan or not any(
            k.startswith(PREFIX) and k.endswith((SKEW, EMBEDDING_SKEW)) for k in source.heads
        ):
            return source.has_plan and self.name == "oftfx"
        if source.config is None:  # which the reader misses, and says so
            return self.name == "peft"
        new = spec_from_config(source.config).parameterization != "cayley_neumann_016"
        new = new and "peft_version" in source.config
        return self.name == ("peft" if new else "peft-0.16")


def as_016(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as PEFT 0.16 and 0.17 had it, without a version.

    Raises:
        AdapterError: the series is not the one that these versions computed.
    """
    if "peft_version" in config and config["use_cayley_neumann"] and config["num_cayley_neumann_terms"] > 2:
        raise AdapterError(
            f"convention 'peft-0.16' has another series: {config['num_cayley_neumann_terms']} terms of today's would "
            "be other rotations there. Train with OFT(parameterization='cayley'), or 'cayley_neumann_016', to write it"
        )
    return {name: value for name, value in config.items() if name != "peft_version"}


def check_native(source: Source, chosen: Convention) -> None:
    """What is read as one of these has to be one: its configuration alone says what its numbers mean.

    Raises:
        AdapterFileError: another one, or a file of another name, beside which nothing is looked for.
    """
    if any(f.name != WEIGHT_FILE for f in source.files.values()):
        raise AdapterFileError(
            f"{source.path}: convention {chosen.name!r} is a directory with {WEIGHT_FILE} and the file that says "
            "what its numbers mean"
        )
    if not chosen.recognizes(source):
        raise AdapterFileError(
            f"{source.path}: by its keys and its configuration this is not convention {chosen.name!r}. Leave "
            "convention out to have it told from the files; of PEFT's, peft_version in adapter_config.json decides"
        )


PEFT, PEFT_016 = Native("peft", "PEFT 0.18 and later"), Native("peft-0.16", "PEFT 0.16 and 0.17")
OURS = Native("oftfx", "oftfx")
