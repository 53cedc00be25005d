"""Charts as SVG and PNG files, for papers; without a browser."""

from __future__ import annotations

from typing import Literal

from oftfx.errors import MissingExtraError
from oftfx.pages.charts import themed
from oftfx.pages.page import Chart

Picture = Literal["svg", "png"]


def picture(chart: Chart, kind: Picture, *, width: int = 640, scale: float = 2.0) -> bytes:
    """One chart as the bytes of a file, dark on nothing (SVG) or on white (PNG).

    Args:
        chart: the chart.
        kind: ``"svg"`` or ``"png"``.
        width: of the plot, in points.
        scale: pixels a point, of a PNG.

    Raises:
        MissingExtraError: ``vl-convert-python`` is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise MissingExtraError("vl-convert-python", "report", "A picture of a chart") from error
    spec = {**themed(chart, "#1a1a1a"), "width": width, "title": {"text": chart.title, "anchor": "start"}}
    if kind == "svg":
        return vl_convert.vegalite_to_svg(spec, vl_version="6.4").encode()
    return vl_convert.vegalite_to_png({**spec, "background": "white"}, vl_version="6.4", scale=scale)
