"""Boxes before and after, as a small SVG in the colours of its page."""

from __future__ import annotations

from html import escape

from oftfx.pages.page import Box, Drawing

_CHARACTER, _TALL, _GAP, _ROW, _HEAD = 7.2, 52, 34, 96, 22


def drawn(drawing: Drawing) -> str:
    """The drawing; its title and what it says are read out by screen readers."""
    rows = (drawing.before, drawing.after)
    wide = max(sum(_wide(b) + _GAP for b in boxes) - _GAP for _, boxes in rows)
    tall = len(rows) * _ROW - (_ROW - _HEAD - _TALL) + 2
    told = ". ".join(f"{head}: {', then '.join(_told(b) for b in boxes)}" for head, boxes in rows)
    parts = [
        f'<svg class="drawing" viewBox="0 0 {wide + 2:.0f} {tall}" width="{wide + 2:.0f}" role="img" '
        f'aria-label="{escape(drawing.title)}. {escape(told)}">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" class="tip"/></marker></defs>',
    ]
    for number, (head, boxes) in enumerate(rows):
        top = number * _ROW
        parts.append(f'<text class="head" x="1" y="{top + 13}">{escape(head)}</text>')
        parts += _row(boxes, top + _HEAD)
    return "".join([*parts, "</svg>"])


def _row(boxes: tuple[Box, ...], top: float) -> list[str]:
    parts, x, middle = list[str](), 1.0, top + _TALL / 2
    for number, box in enumerate(boxes):
        wide = _wide(box)
        if number:
            parts.append(f'<path class="arrow" d="M{x - _GAP + 3:.0f} {middle}H{x - 3:.0f}" marker-end="url(#tip)"/>')
        if box.role != "plain":
            parts.append(f'<rect class="{box.role}" x="{x:.0f}" y="{top}" width="{wide:.0f}" height="{_TALL}" rx="6"/>')
        up = 8 if box.below else 0
        lines = [("name", box.name, middle + 5 - up)] + ([("below", box.below, middle + 15)] if box.below else [])
        parts += [f'<text class="{c}" x="{x + wide / 2:.0f}" y="{y:.0f}">{escape(t)}</text>' for c, t, y in lines]
        x += wide + _GAP
    return parts


def _wide(box: Box) -> float:
    """A box as wide as its longer line."""
    return max(_CHARACTER * max(len(box.name), 0.86 * len(box.below)) + (8 if box.role == "plain" else 24), 24)


def _told(box: Box) -> str:
    return f"{box.name} ({box.below})" if box.below else box.name
