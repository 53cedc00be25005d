"""Whose error it is: the model's, which is a reason to record it otherwise, or a bug of ours, which must be seen."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TypeVar

from oftfx.errors import OftfxError

R = TypeVar("R")


def foreign(function: Callable[..., R], /, *args: Any, **kwargs: Any) -> R:
    """Call code that is not ours.

    Of what compiled code raises, the innermost frame is its caller's, so the caller has to be told apart from our code.
    """
    return function(*args, **kwargs)


def is_bug(error: BaseException) -> bool:
    """Whether an error was raised by a line of oftfx and not on purpose."""
    if isinstance(error, OftfxError):
        return False
    innermost: TracebackType | None = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    if innermost is None:
        return False
    frame = innermost.tb_frame
    return is_ours(frame) and frame.f_code is not foreign.__code__


def is_ours(frame: FrameType) -> bool:
    """Whether a line of oftfx runs there."""
    return frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]
