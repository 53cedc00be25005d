"""The figures of a run, in ``results.json`` of its folder; a folder holds one run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oftfx.errors import OftfxError
from oftfx.files import write_whole
from oftfx.typed_json import read_object


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
    try:
        results = read_object(path)
    except OftfxError as error:
        raise OftfxError(f"{error}; remove it, or choose another folder") from None
    if results.get("size") != size:
        raise OftfxError(
            f"{folder} holds a run with {results.get('size')}, this one is {size}; choose another folder or remove it"
        )
    say(f"continuing the run in {folder}")
    return results


def write(folder: Path, results: dict[str, Any]) -> None:
    """Replace ``results.json``; an interruption leaves the old one."""
    write_whole(folder / "results.json", json.dumps(results, indent=1).encode())
