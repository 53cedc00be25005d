"""What an ``oftfx_fold.json`` holds, checked before anything goes by it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oftfx.files import is_name
from oftfx.folding.report import FoldReport
from oftfx.typed_json import made


@dataclass(frozen=True)
class _Facts:
    """What the ways of reading ask for; each has some of them."""

    floats: tuple[str, ...] = ()
    four_bits: tuple[str, ...] = ()
    quantized: Mapping[str, str] = dataclasses.field(default_factory=dict)
    compute_dtype: str = ""
    only: str = ""


@dataclass(frozen=True)
class _Note:
    way: str
    facts: Mapping[str, Any]
    files: tuple[str, ...]
    checkpoint: str | None
    rotations: str | None
    folds: tuple[Mapping[str, Any], ...]
    report: Mapping[str, Any]


def check_note(note: Mapping[str, Any]) -> None:
    """Raise for a note that no save of ours wrote.

    Raises:
        ValueError: something is missing, of another type, or names a file that is not beside it.
        FoldError: its report is none.
    """
    found = made(_Note, {f.name: note[f.name] for f in dataclasses.fields(_Note) if f.name in note})
    known = {f.name for f in dataclasses.fields(_Facts)}
    made(_Facts, {name: value for name, value in found.facts.items() if name in known}, "facts")
    if found.facts.get("class") is not None:
        made(str, found.facts["class"], "facts.class")
    if (odd := next((name for name in found.files if not is_name(name)), None)) is not None:
        raise ValueError(f"it names the file {odd[:200]!r}; expected files beside it")
    for index, fold in enumerate(found.folds):
        made(str, fold.get("module"), f"folds[{index}].module")
    FoldReport.from_json(json.dumps(note))
