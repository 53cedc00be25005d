"""What becomes of adapters in a graph: constants, swappable inputs, or one for each row of a batch."""

from oftfx.onnx.adapters.base import AdapterMode, Case
from oftfx.onnx.adapters.mixed import Mixed
from oftfx.onnx.adapters.swappable import Swappable

MODES = {"fixed": AdapterMode, "swappable": Swappable, "inputs": Swappable, "mixed": Mixed}

__all__ = ["MODES", "AdapterMode", "Case", "Mixed", "Swappable"]
