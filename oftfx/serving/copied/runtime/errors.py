"""What is wrong: with a model or an adapter file, or with a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_Base: Any
try:  # where oftfx is at hand its own base class; a server has no oftfx
    from oftfx.errors import OftfxError as _Base
except ImportError:
    _Base = Exception


class ServingError(_Base):
    """A model or an adapter file cannot be served."""


class RequestError(ServingError, ValueError):
    """A request is wrong: the sender has to change it. Servers answer with status 400, INVALID_ARGUMENT."""


def unknown_adapter(name: str, names: Sequence[str]) -> RequestError:
    """For a request that names an adapter which is not there."""
    there = ", ".join(names) if names else "none"
    return RequestError(f"unknown adapter {name!r}; there are: {there}; without the parameter the base model answers")
