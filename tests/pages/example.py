"""A small page with one of everything, and texts that want to be more than text."""

from oftfx.pages.charts import Spot, bars, heat_map
from oftfx.pages.page import Banner, Box, Code, Column, Drawing, Page, Section, Table, Terms, Text, Tile, Tiles

EVIL = "</script><script>alert(1)</script><!-- `*_|[x](y) & &lt; ~~x~~ \"'"
SPOTS = [
    Spot("l.0.q", 0, "q", 0.25),
    Spot("l.0.q2", 0, "q", -0.5),
    Spot("l.1.q", 1, "q", None),
    Spot("head", None, "head", 1.0),
]
TABLE = Table(
    f"Caption {EVIL}",
    (Column("site", "code"), Column("n|1", "percent", extreme="lowest"), Column("kind", groups=True, filters=True)),
    (("a.b", 0.5, "x"), (EVIL, None, EVIL), ("c", float("nan"), "x")),
    tools=True,
)
SMALL = Table("Small.", (Column("name"), Column("size", "bytes")), (("one", 2048), ("two|2", None)))
CHART = heat_map("map", f"Map {EVIL}", SPOTS, measure=EVIL, good="high", whole=True)
BARS = bars("bars", "Bars", [(EVIL, 2.0), ("b", 3.5)], measure="things", lines=[("here", 3.0)])
DRAWING = Drawing(EVIL, ("Before", (Box("x", role="plain"), Box(EVIL, "W"))), ("After", (Box("y", EVIL, "changed"),)))
PAGE = Page(
    title=f"Title {EVIL}",
    subtitle=EVIL,
    banner=Banner("amber", "In part", EVIL),
    notices=(EVIL,),
    sections=(
        Section("Tiles & such", (Tiles((Tile("known", "5", EVIL), Tile("unknown", None, "measure it"))),)),
        Section("Tables", (TABLE, SMALL)),
        Section("Charts", (Text(("About charts.",)), CHART, BARS)),
        Section("Rest", (DRAWING, Terms((("name", EVIL), ("empty", ""))), Code(EVIL))),
    ),
    made_by="tests 1",
)
