"""Every error oftfx raises on purpose. One base class, so a caller can catch them all."""

from __future__ import annotations

import sys
import warnings


class OftfxError(Exception):
    """Base of every error that oftfx raises on purpose.

    A message says what was wrong, where (module path), what was found, what was expected and what to do.

    Examples:
        >>> import oftfx, torch
        >>> try:
        ...     oftfx.plan(torch.nn.Sequential(torch.nn.Linear(6, 4)), {"*": oftfx.OFT(4)})
        ... except oftfx.OftfxError as error:
        ...     print(type(error).__name__, error)
        RuleError 0: block_size 4 does not divide in_features 6. Divisors: 1, 2, 3, 6. ...
    """


class OftfxWarning(UserWarning):
    """Something was done that a user should know of."""


def warn(message: str) -> None:
    """Warn at the line of the user's that called us, however deep inside we are."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, OftfxWarning, stacklevel=level)


_INSIDE = ("oftfx", "torch", "contextlib")


class RuleError(OftfxError, ValueError):
    """A rule cannot be understood, matches nothing, or asks for an impossible geometry."""


class TraceError(OftfxError, RuntimeError):
    """The model's program could not be recorded."""


class UnrecordableError(TraceError):
    """Not recorded, and no other way of running the model would help.

    It names no inputs, cannot be copied, or writes into its parameters.
    """


class GuardError(OftfxError, RuntimeError):
    """A recorded graph was called in a way it was not recorded for."""


class AdapterError(OftfxError, ValueError):
    """An adapter name is unknown or taken, or an adapter does not fit the model."""


class AdapterFileError(AdapterError):
    """An adapter file is missing, damaged, foreign, or holds numbers that are not finite."""


class FormatError(OftfxError, ValueError):
    """A weight is stored in a way that its format cannot read or write."""


class FoldError(OftfxError, RuntimeError):
    """A rotation cannot go into a weight."""


class PassError(OftfxError, RuntimeError):
    """A pass broke its declared contract."""


class ExportError(OftfxError, RuntimeError):
    """A model could not be exported, or the exported file does not compute what the model computes."""


class MissingExtraError(OftfxError, ImportError):
    """An optional package is needed and absent; the message names the extra to install."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed. "
            f"Install it with: pip install 'oftfx[{extra}]'"
        )
