"""Checkpoints, folded or not."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from oftfx.adapter.fixed_rotations import FILE as ROTATIONS
from oftfx.adapter.folded import NOTE, read_note
from oftfx.errors import AdapterFileError
from oftfx.folding.checkpoint import checkpoint_digest
from oftfx.folding.report import report_from
from oftfx.inspecting.found import Found, Table
from oftfx.inspecting.headers import read_header
from oftfx.typed_json import read_object

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def inspect_checkpoint(directory: Path) -> Found:
    """What model it is, how it is quantized, what it weighs, and what was folded into it."""
    config = read_object(directory / "config.json")
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        if file.name != ROTATIONS:
            tensors |= read_header(file).tensors
    quantization, architectures = config.get("quantization_config"), config.get("architectures")
    named = architectures if isinstance(architectures, list) and architectures else [config.get("model_type")]
    facts: dict[str, Any] = {
        "model": ", ".join(map(str, named)),
        **{name: config[name] for name in _SIZES if name in config},
        "quantized": _quantized(quantization if isinstance(quantization, dict) else {}),
        "tensors": len(tensors),
        "bytes": sum(size for _, _, size in tensors.values()),
        "dtypes": dict(Counter(dtype for dtype, _, _ in tensors.values())),
        "digest": checkpoint_digest(directory),
    }
    faults: list[str] = []
    folds = directory / NOTE
    if not folds.is_file():
        if (directory / ROTATIONS).is_file():
            facts["rotations"] = f"{ROTATIONS}, without {NOTE}"
        return Found("checkpoint", directory, facts, _by_kind(tensors), tuple(faults))
    try:
        note = read_note(directory)
    except AdapterFileError as error:
        return Found("fold", directory, facts, None, (str(error),))
    report = report_from(note)
    facts |= {
        "written by": f"oftfx {note.get('oftfx')}",
        "folds": [_fold(f) for f in note["folds"]],
        "actions": dict(Counter(s.action for s in report)),
        "survival of the update": f"{report.survival:.1%}" if note["folds"] and report.survival is not None else None,
        "rotations in front": ROTATIONS if note["rotations"] is not None else "none",
    }
    worst = sorted(report, key=lambda s: -s.relative_error)[:10]
    rows = [(s.fqn, s.format, s.action, f"{s.relative_error:.2e}", f"{s.survival:.1%}", s.note) for s in worst]
    table = Table("Largest errors", ("site", "format", "action", "relative error", "survival", "note"), rows)
    return Found("fold" if note["folds"] else "checkpoint", directory, facts, table if rows else None, tuple(faults))


def _quantized(config: dict[str, Any]) -> str | None:
    if not config:
        return None
    method = config.get("quant_method") or "by an unnamed method"
    bits = config.get("bits") or (4 if config.get("load_in_4bit") else 8 if config.get("load_in_8bit") else None)
    kind = config.get("bnb_4bit_quant_type") if config.get("load_in_4bit") else config.get("format")
    group = config.get("group_size")
    said = [str(method), f"{bits} bits" if bits else "", str(kind or ""), f"groups of {group}" if group else ""]
    return ", ".join(part for part in said if part)


def _fold(note: dict[str, Any]) -> str:
    names = note.get("adapters") or note.get("adapter_hashes") or {}
    if isinstance(names, dict):
        return ", ".join(f"{name} ({str(value)[:12]})" for name, value in names.items())
    return ", ".join(map(str, names))


def _by_kind(tensors: dict[str, tuple[str, tuple[int, ...], int]]) -> Table | None:
    groups: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for name, (dtype, shape, size) in tensors.items():
        groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), dtype, shape), []).append(size)
    rows = [(n, str(len(s)), d, "x".join(map(str, shape)), f"{sum(s):,}") for (n, d, shape), s in groups.items()]
    return Table("Tensors", ("name", "count", "dtype", "shape", "bytes"), rows) if rows else None
