"""A page as Markdown, for model cards and pull requests: what can be said without charts and colours."""

from __future__ import annotations

from oftfx.pages.figures import MISSING, written
from oftfx.pages.page import Banner, Chart, Code, Page, Part, Section, Table, Terms, Text, Tiles

_MARKS = {"green": "✅", "amber": "⚠️", "red": "❌", "neutral": "ℹ️"}  # noqa: RUF001


def markdown(page: Page, *, heading: int = 1, tools: bool = False) -> str:
    """The page as GitHub's Markdown.

    Args:
        page: the page.
        heading: level of its title; 2 inside of another document.
        tools: also the long tables, those that readers of the HTML page sort and search.
    """
    parts = [f"{'#' * heading} {escaped(page.title)}", escaped(page.subtitle), banner(page.banner)]
    if page.notices:
        parts.append("\n".join(f"- {escaped(n)}" for n in page.notices))
    parts += [t for s in page.sections if (t := section(s, heading + 1, tools=tools))]
    return "\n\n".join(p for p in parts if p) + "\n"


def section(one: Section, heading: int = 2, *, tools: bool = False) -> str:
    """One section, or nothing where all of it is charts or long tables, or text about charts."""
    if any(isinstance(p, Chart) for p in one.parts) and all(isinstance(p, Chart | Text) for p in one.parts):
        return ""
    texts = [t for p in one.parts if (t := part(p, tools=tools))]
    return "\n\n".join([f"{'#' * heading} {escaped(one.title)}", *texts]) if texts else ""


def banner(one: Banner) -> str:
    """The verdict in a line."""
    return f"> {_MARKS[one.state]} **{escaped(one.label)}.** {escaped(one.sentence)}"


def part(one: Part, *, tools: bool = False) -> str:
    """One part; of a chart nothing."""
    if isinstance(one, Text):
        return "\n\n".join(map(escaped, one.paragraphs))
    if isinstance(one, Tiles):
        lines = ((t.label, MISSING if t.value is None else t.value, t.note) for t in one.tiles)
        return "\n".join(["| | | |", "|---|---|---|", *map(_line, lines)])
    if isinstance(one, Terms):
        texts = (
            (f"**{escaped(n)}**", _coded(t) if one.code and t else escaped(t or "not recorded")) for n, t in one.pairs
        )
        return "\n".join(f"- {name}: {text}" for name, text in texts)
    if isinstance(one, Table):
        return "" if one.tools and not tools else table(one)
    if isinstance(one, Code):
        return f"```{one.language}\n{one.text.strip()}\n```"
    return ""


def table(one: Table) -> str:
    """A table with its caption."""
    columns = one.columns
    rule = "".join("---|" if c.style in ("text", "code") else "---:|" for c in columns)
    rows = [
        "| "
        + " | ".join(
            _coded(str(v)) if c.style == "code" and v else escaped(written(v, c.style))
            for v, c in zip(row, columns, strict=True)
        )
        + " |"
        for row in one.rows
    ]
    head = "| " + " | ".join(escaped(c.title) for c in columns) + " |"
    return "\n".join([f"{escaped(one.caption)}\n", head, f"|{rule}", *rows])


def escaped(text: str) -> str:
    """Text in which Markdown and HTML see no signs of theirs."""
    text = text.replace("&", "&amp;")
    for sign in "\\`*_[]<>|#~":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def _coded(text: str) -> str:
    fence = "``" if "`" in text else "`"
    return f"{fence}{text.replace('|', chr(92) + '|')}{fence}" if text else ""


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(map(escaped, cells)) + " |"
