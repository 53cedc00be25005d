"""The names by which an exported file and whoever runs it agree. Strings only: exporter and servers both read them."""

MODE = "oftfx.adapter_mode"
"""Metadata: one of `MODES`."""

MODES = ("fixed", "swappable", "inputs", "mixed")

INTERFACE = "oftfx.interface"
"""Metadata: the number that an ``.onnx_adapter`` file's model version has to be."""

ADAPTERS = "oftfx.adapters"
"""Metadata: names of the adapters in the file, with commas between them."""

ADAPTER_NAMES = "oftfx.adapter_names"
"""Metadata of a mixed file: JSON list of the names of its stack; the first, ``""``, is the base model."""

ROTATIONS = "oftfx.rotations"
"""Metadata of a swappable file: JSON, for each rotated site the name of its blocks."""

MODEL = "oftfx.model"
"""Metadata: the class of the model."""

ATTENTION = "oftfx.attention"
"""Metadata of a decoder whose attention is one operator: its name. Prompts are padded on the right there."""

ADAPTER_INDEX = "adapter_index"
"""Input of a mixed file: for each row its adapter's place in the stack."""

SUFFIX = ".onnx_adapter"
"""Ending of a file that holds one adapter."""
