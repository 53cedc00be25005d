"""What a target is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oftfx.errors import OftfxError


@dataclass(frozen=True)
class Target:
    """Something of ours that reads what others wrote.

    Attributes:
        name: of it.
        seeds: inputs that it takes, made in an empty directory.
        read: gives it an input; the directory is empty and goes afterwards.
        words: that mean something in its inputs.
        needs: optional packages.
    """

    name: str
    seeds: Callable[[Path], Sequence[bytes]]
    read: Callable[[bytes, Path], Any]
    words: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def every(*calls: Callable[[], Any]) -> None:
    """All of them, whichever refuses; then the last refusal."""
    last = None
    for call in calls:
        try:
            call()
        except OftfxError as error:
            last = error
            if not str(error).strip():
                break
    if last is not None:
        raise last
