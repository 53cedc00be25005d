"""The figures of a run, in ``results.json`` of its folder; a folder holds one run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oftfx.errors import OftfxError


def read(folder: Path, size: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Figures of the run that is in ``folder``, or of a new one.

    Args:
        folder: made where it is not there.
        size: what the run does; it is part of the figures.
        say: told that a run goes on.

    Raises:
        OftfxError: the folder holds a run of another size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    if not path.exists():
        return {"size": size}
    results = json.loads(path.read_text())
    if results.get("size") != size:
        raise OftfxError(
            f"{folder} holds a run with {results.get('size')}, this one is {size}; choose another folder or remove it"
        )
    say(f"continuing the run in {folder}")
    return results


def write(folder: Path, results: dict[str, Any]) -> None:
    """Replace ``results.json``; an interruption leaves the old one."""
    partial = folder / "results.json.part"
    partial.write_text(json.dumps(results, indent=1))
    os.replace(partial, folder / "results.json")
