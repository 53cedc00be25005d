"""How layers store their weights, one file a format; `registry` finds the one of a layer.

Formats are recognised by class name and tensors: nothing here imports a quantization package. What is done to weights
is in `oftfx.passes`.
"""

from oftfx.formats.base import Geometry, WeightFormat, WeightState
from oftfx.formats.layout import Layout
from oftfx.formats.registry import format_named, format_of, formats, register_format
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes, Float4, Float8, Grid, Integers, Levels, Partition, Table

__all__ = [
    "Codes",
    "Float4",
    "Float8",
    "Geometry",
    "Grid",
    "Integers",
    "Layout",
    "Levels",
    "Partition",
    "ScalarFormat",
    "Table",
    "WeightFormat",
    "WeightState",
    "format_named",
    "format_of",
    "formats",
    "register_format",
]
