"""Charts as Vega-Lite specifications, from plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from oftfx.pages.figures import written
from oftfx.pages.page import Chart, Style

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
_ELSEWHERE = "none"
_FORMATS = {"percent": ".3~p", "angle": ".3~g", "count": ",d", "number": ".5~g", "bytes": ""}
_BYTES = (
    "datum.value >= 1073741824 ? format(datum.value / 1073741824, '.3~g') + ' GiB' : datum.value >= 1048576 ? "
    "format(datum.value / 1048576, '.3~g') + ' MiB' : format(datum.value / 1024, '.3~g') + ' KiB'"
)
_BLUE = "#3b7dd8"


@dataclass(frozen=True)
class Spot:
    """One square of a heat map.

    Attributes:
        name: what it stands for; a click on it looks that up in the page's table.
        depth: its column; None for what stands outside of the layers.
        kind: its row.
        value: its colour; None, or not finite, where it was not measured.
    """

    name: str
    depth: int | None
    kind: str
    value: float | None


def heat_map(
    name: str,
    title: str,
    spots: Sequence[Spot],
    *,
    measure: str,
    style: Style = "percent",
    good: Literal["high", "low", ""] = "",
    whole: bool = False,
) -> Chart | None:
    """Values over depth and kind; None where nothing was measured.

    Where something is good its end of the scale is bright, whichever it is.

    Args:
        name: for files.
        title: above it.
        spots: squares; of several in one place the worst is shown (the highest where nothing is good).
        measure: what the values are.
        style: how they are written.
        good: which end is.
        whole: the scale runs from 0 to 1 whatever the values are; beyond it they have the colour of its end.
    """
    spots = [s if s.value is None or math.isfinite(s.value) else replace(s, value=None) for s in spots]
    known = [s for s in spots if s.value is not None]
    if not known:
        return None
    kinds = list(dict.fromkeys(s.kind for s in spots))
    depths = sorted({s.depth for s in spots if s.depth is not None})
    columns = [*map(str, depths), *([_ELSEWHERE] if any(s.depth is None for s in spots) else [])]
    places: dict[tuple[str, str], list[Spot]] = {}
    for spot in spots:
        places.setdefault((_ELSEWHERE if spot.depth is None else str(spot.depth), spot.kind), []).append(spot)
    rows = [_square(place, inside, style, good) for place, inside in places.items()]
    scale: dict[str, Any] = {"scheme": "cividis" if not good else "viridis", "reverse": good == "low", "clamp": True}
    if whole:
        scale["domain"] = [0, 1]
    else:  # from 0 on, or small differences look large; a scale of no length has no colour
        scale["domain"] = [0, max(s.value or 0.0 for s in known) or 1]
    spec = {
        "data": {"values": rows},
        "width": "container",
        "height": 22 * len(kinds),
        "mark": {"type": "rect", "cursor": "pointer", "invalid": "show"},
        "encoding": {
            "x": {
                "field": "layer",
                "type": "ordinal",
                "title": "layer",
                "scale": {"domain": columns, "paddingInner": 0.06},
                "axis": {"labelAngle": 0, "labelOverlap": True, "labelSeparation": 4, "domain": False, "ticks": False},
            },
            "y": {
                "field": "kind",
                "type": "nominal",
                "title": None,
                "scale": {"domain": kinds, "paddingInner": 0.06},
                "axis": {"labelLimit": 190, "domain": False, "ticks": False},
            },
            "color": {
                "condition": {"test": "datum.value === null", "value": "#8888"},
                "field": "value",
                "type": "quantitative",
                "title": measure,
                "scale": scale,
                "legend": {"format": _FORMATS.get(style, ""), "orient": "bottom", "direction": "horizontal"},
            },
            "tooltip": [{"field": "name", "title": "site"}, {"field": "shown", "title": measure}],
        },
    }
    lowest, highest = (f(known, key=lambda s: s.value or 0.0) for f in (min, max))
    says = (
        f"{measure} of {len(spots)} sites by layer and kind: from {written(lowest.value, style)} ({lowest.name}) to "
        f"{written(highest.value, style)} ({highest.name})."
    )
    return Chart(name, title, says, spec)


def _square(place: tuple[str, str], inside: list[Spot], style: Style, good: str) -> dict[str, Any]:
    known = [s for s in inside if s.value is not None]
    pick = min if good == "high" else max
    shown = pick(known, key=lambda s: s.value or 0.0) if known else inside[0]
    more = f" (worst of {len(inside)} here)" if len(inside) > 1 else ""
    return {
        "layer": place[0],
        "kind": place[1],
        "value": shown.value,
        "name": shown.name,
        "shown": written(shown.value, style) + more,
    }


def bars(
    name: str,
    title: str,
    values: Sequence[tuple[str, float]],
    *,
    measure: str,
    style: Style = "number",
    lines: Sequence[tuple[str, float]] = (),
    dots: bool = False,
) -> Chart:
    """Horizontal bars in the order given, with labels; ``lines`` are marked across all of them.

    Args:
        name: for files.
        title: above them.
        values: label and length of each; what is not finite has no bar.
        measure: what the lengths are.
        style: how they are written.
        lines: label and place of each.
        dots: dots instead, on a scale that need not begin at 0: for values that differ by little of themselves.
    """
    values, lines = ([(n, v) for n, v in some if math.isfinite(v)] for some in (values, lines))
    rows = [{"label": label, "value": value, "shown": written(value, style)} for label, value in values]
    room = {"zero": not dots, **({"padding": 30} if dots else {})}
    axis = {"format": _FORMATS.get(style, ""), "tickCount": 6}
    if style == "bytes":  # in units of 1024, which Vega does not count in
        axis["labelExpr"] = _BYTES
    y = {
        "field": "label",
        "type": "nominal",
        "sort": None,
        "title": None,
        "axis": {"labelLimit": 190, "ticks": False, "domain": False},
    }
    x = {"field": "value", "type": "quantitative", "title": measure, "axis": axis, "scale": room}
    tooltip = [{"field": "label", "title": " "}, {"field": "shown", "title": measure}]
    layers: list[dict[str, Any]] = [
        {
            "mark": {"type": "point", "filled": True, "opacity": 1, "size": 110, "color": _BLUE}
            if dots
            else {"type": "bar", "cornerRadiusEnd": 3, "color": _BLUE, "height": {"band": 0.7}},
            "encoding": {"y": y, "x": x, "tooltip": tooltip},
        },
        {
            "mark": {"type": "text", "align": "left", "dx": 10 if dots else 5},
            "encoding": {"y": y, "x": x, "text": {"field": "shown"}},
        },
    ]
    if lines:
        marks = [{"label": label, "value": value, "shown": written(value, style)} for label, value in lines]
        legend = {"orient": "top", "title": None, "symbolType": "stroke", "symbolStrokeWidth": 3}
        layers.append(
            {
                "data": {"values": marks},
                "mark": {"type": "rule", "size": 2, "strokeDash": [5, 3]},
                "encoding": {
                    "x": x,
                    "color": {
                        "field": "label",
                        "sort": None,
                        "scale": {"range": ["#d9822b", "#1b9e77", "#9467bd"]},
                        "legend": legend,
                    },
                    "tooltip": tooltip,
                },
            }
        )
    spec = {"data": {"values": rows}, "width": "container", "height": 28 * len(rows), "layer": layers}
    told = "; ".join(f"{label}: {written(value, style)}" for label, value in [*values, *lines])
    return Chart(name, title, f"{measure}: {told}.", spec)


def themed(chart: Chart, colour: str) -> dict[str, Any]:
    """The whole specification, with text and axes in one colour."""
    faint = "#8888"
    return {
        "$schema": SCHEMA,
        "background": "transparent",
        **chart.spec,
        "config": {
            "font": "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif",
            "aria": False,  # the figure says it as a whole; hundreds of marks help nobody
            "view": {"stroke": None},
            "axis": {
                "labelColor": colour,
                "titleColor": colour,
                "gridColor": faint,
                "domainColor": faint,
                "tickColor": faint,
                "labelFontSize": 12,
                "titleFontSize": 12,
                "titleFontWeight": "normal",
                "gridOpacity": 0.4,
            },
            "legend": {
                "labelColor": colour,
                "titleColor": colour,
                "labelFontSize": 12,
                "titleFontSize": 12,
                "titleFontWeight": "normal",
                "titleLimit": 300,
                "gradientLength": 180,
                "gradientThickness": 12,
            },
            "text": {"color": colour, "fontSize": 12},
        },
    }
