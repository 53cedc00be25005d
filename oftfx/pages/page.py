"""What a page holds, as plain data; `oftfx.pages.html` and `oftfx.pages.markdown` write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["green", "amber", "red", "neutral"]
Style = Literal["text", "code", "percent", "count", "bytes", "number", "fixed", "angle"]
Cell = str | int | float | None


@dataclass(frozen=True)
class Banner:
    """The verdict at the top: its state in a colour, and in words for who does not see it."""

    state: State
    label: str
    sentence: str


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Tile:
    """One figure that stands out. ``value`` is None where it was not measured; ``note`` then says what would."""

    label: str
    value: str | None
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    """Figures side by side."""

    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Terms:
    """Names with what they mean, or with their values.

    Attributes:
        pairs: name and text; an empty text reads "not recorded".
        code: the texts are code.
    """

    pairs: tuple[tuple[str, str], ...]
    code: bool = False


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        title: heading, with the unit where the cells do not show it.
        style: how its numbers are written; see `oftfx.pages.figures.written`.
        hint: what the column is.
        filters: readers can choose among its values.
        groups: readers can group rows by it.
        extreme: what a group's own line says of it.
        hidden: it is there for search and groups only.
    """

    title: str
    style: Style = "text"
    hint: str = ""
    filters: bool = False
    groups: bool = False
    extreme: Literal["", "lowest", "highest"] = ""
    hidden: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells; a cell that is None was not measured.

    Attributes:
        caption: what it shows.
        columns: one a cell.
        rows: the cells. The first one names its row.
        tools: readers can sort, search, filter and group; for long tables.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    tools: bool = False


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite chart.

    Attributes:
        name: for files; letters and hyphens.
        title: what it shows.
        says: the same in a sentence or two, for who cannot see it.
        spec: the specification, without title and configuration.
    """

    name: str
    title: str
    says: str
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class Drawing:
    """Boxes in a row, before and after.

    Attributes:
        title: what it shows.
        before: boxes from left to right, and a heading.
        after: the same.
    """

    title: str
    before: tuple[str, tuple[Box, ...]]
    after: tuple[str, tuple[Box, ...]]


@dataclass(frozen=True)
class Box:
    """One box: two short lines of text. ``role`` chooses its look; plain text stands without a frame."""

    name: str
    below: str = ""
    role: Literal["plain", "layer", "rotation", "changed"] = "layer"


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    text: str
    language: str = "python"


Part = Text | Tiles | Terms | Table | Chart | Drawing | Code


@dataclass(frozen=True)
class Section:
    """A heading with what stands below."""

    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: the heading.
        subtitle: what it is about, in a line.
        banner: the verdict.
        notices: what a reader should not overlook.
        sections: in order.
        made_by: program and version, for the foot.
    """

    title: str
    subtitle: str
    banner: Banner
    notices: tuple[str, ...]
    sections: tuple[Section, ...]
    made_by: str

    @property
    def charts(self) -> tuple[Chart, ...]:
        """All charts, in order."""
        return tuple(p for s in self.sections for p in s.parts if isinstance(p, Chart))
