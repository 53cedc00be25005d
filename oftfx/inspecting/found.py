"""What was found, as facts and one table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oftfx.errors import OftfxError
from oftfx.terminal import plain, render


class InspectError(OftfxError, ValueError):
    """There is nothing, or nothing that is known."""


@dataclass(frozen=True)
class Table:
    """Rows of text under headings."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Found:
    """What something is.

    Attributes:
        kind: ``adapter``, ``checkpoint``, ``fold``, ``onnx``, ``onnx adapter``, ``plan``, ``training``, ``repository``.
        path: where.
        facts: by name, plain values.
        table: what there are several of, or None.
        faults: what is wrong with it.
    """

    kind: str
    path: Path
    facts: Mapping[str, Any]
    table: Table | None = None
    faults: tuple[str, ...] = field(default=())

    def to_json(self) -> str:
        """All of it as JSON text."""
        rows = [dict(zip(self.table.columns, r, strict=True)) for r in self.table.rows] if self.table else None
        return json.dumps(
            {"kind": self.kind, "path": str(self.path), **self.facts, "rows": rows, "faults": self.faults},
            indent=1,
            default=ascii,
        )

    def __str__(self) -> str:
        width = max((len(name) for name in self.facts), default=0)
        lines = [f"{self.path}: {self.kind}"]
        lines += [
            f"  {name:<{width}}  {_shown(value)}" for name, value in self.facts.items() if value not in (None, "")
        ]
        lines += [f"fault: {fault}" for fault in self.faults]
        text = plain("\n".join(lines)) + "\n"
        return text + render(self.table.title, self.table.columns, self.table.rows) if self.table else text


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
