"""Numbers as people read them, with their units."""

from __future__ import annotations

import math

from oftfx.pages.page import Cell, Style

MISSING = "not measured"


def written(value: Cell, style: Style = "text") -> str:
    """One cell as text; `MISSING` for None.

    Args:
        value: the cell.
        style: ``percent`` of a share, ``bytes``, ``count``, ``angle`` in degrees, ``fixed`` with three decimals,
            ``number`` with four digits; text is left as it is.

    Examples:
        >>> [written(0.0123, "percent"), written(12345, "count"), written(None)]
        ['1.23%', '12,345', 'not measured']
    """
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "not finite"
    if style == "percent":
        return percent(value)
    if style == "bytes":
        return nbytes(int(value))
    if style == "count":
        return f"{int(value):,}"
    if style == "angle":
        return f"{value:.2f}°" if value >= 0.1 or not value else f"{value:.1e}°"
    return f"{value:.3f}" if style == "fixed" else f"{value:.4g}"


def percent(share: float) -> str:
    """A share with three digits or so; never "100%" by rounding up what is visibly less."""
    size = abs(100 * share)
    if not size:
        return "0%"
    if size < 0.001:
        return f"{100 * share:.0e}%"
    digits = 3 if size < 0.1 else 2 if size < 10 else 1
    return f"{100 * share:.{digits}f}%"


def nbytes(size: int) -> str:
    """Bytes in binary units."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.1f}\N{NO-BREAK SPACE}{unit}"
    return f"{size}\N{NO-BREAK SPACE}B"
