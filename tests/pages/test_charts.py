"""Charts: what is in them, and their pictures."""

import io
import xml.etree.ElementTree as ElementTree

import pytest

from oftfx.pages.charts import Spot, bars, heat_map, themed
from oftfx.pages.figures import nbytes, percent, written
from oftfx.pages.pictures import picture
from tests.pages.example import BARS, CHART, DRAWING, EVIL


def test_the_worst_of_several_sites_in_one_place_is_shown():
    rows = {(r["layer"], r["kind"]): r for r in CHART.spec["data"]["values"]}
    assert len(rows) == 3
    assert (rows["0", "q"]["value"], rows["0", "q"]["name"]) == (-0.5, "l.0.q2")
    assert rows["0", "q"]["shown"] == "-50.0% (worst of 2 here)"
    assert (rows["1", "q"]["value"], rows["1", "q"]["shown"]) == (None, "not measured")
    assert CHART.spec["encoding"]["x"]["scale"]["domain"] == ["0", "1", "none"]
    assert "from -50.0% (l.0.q2) to 100.0% (head)" in CHART.says


def test_scales():
    spots = [Spot("a", 0, "k", 0.2), Spot("b", 1, "k", 0.3)]
    low = heat_map("e", "E", spots, measure="error", good="low").spec["encoding"]["color"]["scale"]
    assert (low["domain"], low["reverse"]) == ([0, 0.3], True)
    zero = heat_map("e", "E", [Spot("a", 0, "k", 0.0)], measure="error", good="low").spec["encoding"]["color"]["scale"]
    assert zero["domain"] == [0, 1]
    assert heat_map("e", "E", [Spot("a", 0, "k", None)], measure="error") is None
    assert bars("b", "B", [("x", 5.0)], measure="m", dots=True).spec["layer"][0]["mark"]["type"] == "point"


@pytest.mark.needs("vl_convert", "PIL")
@pytest.mark.parametrize("chart", [CHART, BARS], ids=["map", "bars"])
def test_pictures_are_pictures(chart):
    from PIL import Image

    root = ElementTree.fromstring(picture(chart, "svg"))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = "".join(root.itertext())
    assert "alert(1)" in texts  # as text
    image = Image.open(io.BytesIO(picture(chart, "png", width=300, scale=2))).convert("RGB")
    assert image.width >= 600
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert len(image.getcolors(1 << 20)) > 10


@pytest.mark.needs("vl_convert")
def test_a_map_has_a_square_for_every_place_and_its_colours_are_in_order():
    import vl_convert

    spots = [Spot(f"{i}", i, "k", i / 10) for i in range(11)]
    chart = heat_map("m", "M", spots, measure="share", good="high", whole=True)
    root = ElementTree.fromstring(vl_convert.vegalite_to_svg({**themed(chart, "#000"), "width": 440}, vl_version="6.4"))
    (marks,) = [g for g in root.iter() if "mark-rect" in g.get("class", "") and "role-mark" in g.get("class", "")]
    fills = [p.get("fill") for p in marks]
    assert len(fills) == len(set(fills)) == 11
    light = [
        sum(int(f[i : i + 2], 16) for i in (1, 3, 5)) if f.startswith("#") else sum(map(int, f[4:-1].split(",")))
        for f in fills
    ]
    assert light[0] < light[5] < light[10]  # the good end is the bright one


@pytest.mark.needs("vl_convert")
def test_what_was_not_measured_has_a_square_of_its_own_colour():
    spots = [Spot("a", 0, "k", 0.5), Spot("b", 1, "k", None), Spot("c", 2, "k", float("nan"))]
    root = ElementTree.fromstring(picture(heat_map("m", "M", spots, measure="share", good="high"), "svg"))
    (marks,) = [g for g in root.iter() if "mark-rect" in g.get("class", "") and "role-mark" in g.get("class", "")]
    assert [p.get("fill") == "#8888" for p in marks] == [False, True, True]


def test_a_drawing_is_xml_with_its_words():
    from oftfx.pages.drawing import drawn

    root = ElementTree.fromstring(drawn(DRAWING))
    assert EVIL in root.get("aria-label")
    assert [t.text for t in root.iter("text")] == ["Before", "x", EVIL, "W", "After", "y", EVIL]
    right = float(root.get("viewBox").split()[2])
    assert all(float(r.get("x")) + float(r.get("width")) <= right for r in root.iter("rect"))


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100.0%"), (0.5, "50.0%"), (0.012345, "1.23%"), (-0.0004, "-0.040%"), (1e-9, "1e-07%"), (0.0, "0%")],
)
def test_percentages(share, text):
    assert percent(share) == text


def test_units():
    space = "\N{NO-BREAK SPACE}"
    assert [nbytes(n) for n in (5, 1536, 3 << 20, 5 << 30)] == [
        f"5{space}B",
        f"1.5{space}KiB",
        f"3.0{space}MiB",
        f"5.0{space}GiB",
    ]
    assert written(0.05, "angle") == "5.0e-02°"
    assert written(12.345, "angle") == "12.35°" or written(12.345, "angle") == "12.34°"
    assert written(float("inf"), "percent") == "not finite"
    assert written(1234.5678, "fixed") == "1234.568"
