"""What the user has said of Triton's operators: `OFTFX_TRITON`, see `oftfx.rotation.triton.choose`."""

from __future__ import annotations

import os
from importlib.util import find_spec

from oftfx.errors import MissingExtraError, OftfxError

SETTINGS = ("auto", "0", "1")

THERE = find_spec("triton") is not None  # without importing it


def setting() -> str:
    """As it is in the environment now."""
    return os.environ.get("OFTFX_TRITON", "").strip() or "auto"


def on_cpu(said: str) -> bool:
    """Whether operators run on a CPU as well, in Triton's interpreter."""
    return said == "1" and os.environ.get("TRITON_INTERPRET") == "1"


def wanted(said: str, there: bool) -> bool:
    """Whether a setting other than ``auto`` takes Triton's; ``there``: whether it is installed."""
    if said not in SETTINGS:
        raise OftfxError(f"OFTFX_TRITON: got {said!r}, expected one of {', '.join(SETTINGS)}")
    if said == "1" and not there:
        raise MissingExtraError("triton", "triton", "OFTFX_TRITON=1")
    return said == "1"
