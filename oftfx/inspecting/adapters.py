"""Adapter directories, ours and PEFT's."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from oftfx.adapter import peft_files
from oftfx.adapter.belonging import KEY, check_belongs
from oftfx.adapter.save import PLAN_FILE
from oftfx.adapter.scales import SCALE_FILE
from oftfx.errors import AdapterFileError
from oftfx.inspecting.found import Found, Table
from oftfx.inspecting.headers import digest, read_header
from oftfx.typed_json import read_object

COLUMNS = ("layers", "count", "blocks", "block size", "parameters")
_SAID = (
    "base_model_name_or_path", "target_modules", "oft_block_size", "r", "use_cayley_neumann",
    "num_cayley_neumann_terms", "block_share", "coft", "eps", "modules_to_save", "bias", "peft_version",
)  # fmt: skip


def inspect_adapter(directory: Path) -> Found:
    """Its rotations by kind of layer, what its configuration says, and whether its files belong together."""
    path = directory / peft_files.WEIGHT_FILE
    header = read_header(path)
    own = (directory / PLAN_FILE).is_file()
    side = directory / (PLAN_FILE if own else peft_files.CONFIG_FILE)
    config = read_object(side) if side.is_file() else {}
    faults = [] if side.is_file() else [f"there is no {side.name}, which says how the numbers become a rotation"]
    try:
        if config:
            check_belongs(header.notes, config, path, side.name)
    except AdapterFileError as error:
        faults.append(str(error))
    skews = {n: s for n, (_, s, _) in header.tensors.items() if _SKEW.search(n)}
    facts: dict[str, Any] = {
        "convention": "oftfx"
        if own
        else f"{config.get('peft_type', 'unknown')} of PEFT {config.get('peft_version') or ''}",
        "rotations": len(skews),
        "other tensors": len(header.tensors) - len(skews),
        "parameters": header.numbers,
        "dtypes": dict(Counter(dtype for dtype, _, _ in header.tensors.values())),
        **({} if own else {name: config[name] for name in _SAID if config.get(name) not in (None, False, [], 0)}),
        "trained scales": "yes" if (directory / SCALE_FILE).is_file() else None,
        "config belongs to the weights": "yes" if KEY in header.notes and not faults else None,
        "sha256 of the weights": digest(path),
    }
    return Found("adapter", directory, facts, _table(skews), tuple(faults))


_SKEW = re.compile(r"\.oft(_embedding)?_R\.weight$")


def _table(skews: dict[str, tuple[int, ...]]) -> Table | None:
    groups: dict[tuple[str, int, int], list[int]] = {}
    for name, shape in skews.items():
        if len(shape) != 2:
            continue
        rows, width = shape
        site = _SKEW.sub("", name).removeprefix(peft_files.PREFIX)
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", site)
        size = (1 + math.isqrt(1 + 8 * width)) // 2
        groups.setdefault((pattern, rows, size), []).append(rows * width)
    cells = [(p, str(len(n)), str(r), str(s), f"{sum(n):,}") for (p, r, s), n in groups.items()]
    return Table("Rotations", COLUMNS, cells) if cells else None
