"""A page as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import json
import math
import re
from importlib.resources import files
from typing import Any

from oftfx.errors import MissingExtraError
from oftfx.pages import libraries
from oftfx.pages.charts import themed
from oftfx.pages.drawing import drawn
from oftfx.pages.figures import MISSING, written
from oftfx.pages.page import Cell, Chart, Column, Page, Part, Table

_BELOW_ALL = "-1e300"  # where what was not measured sorts to


def html(page: Page) -> str:
    """The page's text.

    It follows the reader's colours (light or dark), prints, fits narrow screens, and can be read and worked with by
    keyboard and screen reader; without scripts the tables are all there, only the charts are not.

    Raises:
        MissingExtraError: a package of the ``report`` extra is not installed.
    """
    try:
        from jinja2 import Environment, FunctionLoader
        from markupsafe import Markup
    except ImportError as error:
        raise MissingExtraError("jinja2", "report", "An HTML report") from error
    folder = files("oftfx.pages") / "templates"

    def breakable(path: str) -> Markup:
        return Markup(".<wbr>").join(path.split("."))

    def text(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(text))
    environment.filters |= {"written": _shown, "order": order, "slug": slug, "breakable": breakable}
    environment.globals |= {"kind": lambda part: type(part).__name__, "missing": MISSING, "ranks_of": ranks_of}
    tools = any(getattr(p, "tools", False) for s in page.sections for p in s.parts)
    return environment.get_template("page.html").render(
        page=page,
        css=Markup(text("page.css")),
        script=Markup(text("page.js")),
        vega=Markup(libraries.vega()) if page.charts else "",
        datatables=libraries.datatables() if tools else "",
        notices=libraries.notices(),
        draw=lambda part: Markup(drawn(part)),
        spec=lambda chart: Markup(data(themed(chart, "currentColor"))),
        height=height,
    )


def _shown(value: Cell, column: Column) -> str:
    return written(value, column.style)


def order(value: Cell) -> str:
    """By what a cell with a number is sorted."""
    return _BELOW_ALL if value is None or (isinstance(value, float) and math.isnan(value)) else repr(value)


def ranks_of(table: Table) -> list[dict[Cell, int]]:
    """For columns of texts that group rows the order of their values, which is that of the rows; else nothing."""
    ranks = []
    for number, column in enumerate(table.columns):
        values = dict.fromkeys(row[number] for row in table.rows)
        ranks.append({v: i for i, v in enumerate(values)} if column.groups and column.style == "text" else {})
    return ranks


def slug(title: str) -> str:
    """A heading as the name of a place in the page."""
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def height(chart: Part) -> int:
    """Room for a chart before it is there, in pixels, so that nothing jumps."""
    if not isinstance(chart, Chart):
        return 0
    return int(chart.spec["height"]) + 110


def data(value: Any) -> str:
    """Data that can stand in a script element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")
