"""Where a rotation acts: on the input of a layer, on its output, or on its weight. Hooks, so every name stays."""

from oftfx.placement.base import Placement, SiteRotations
from oftfx.placement.find import placements_on, rotated_sites, without_rotation
from oftfx.placement.input import RotateInput
from oftfx.placement.output import RotateOutput
from oftfx.placement.weight import RotateWeight

__all__ = [
    "Placement",
    "RotateInput",
    "RotateOutput",
    "RotateWeight",
    "SiteRotations",
    "placements_on",
    "rotated_sites",
    "without_rotation",
]
