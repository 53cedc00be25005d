"""A pytest plugin: registers the format of tests/examples/write_a_format.py before oftfx has looked at any layer."""

from pathlib import Path

_EXAMPLE = Path(__file__).parents[1] / "examples" / "write_a_format.py"
_TEXT = _EXAMPLE.read_text().split("# --8<-- [start:format]")[1].split("# --8<-- [end:format]")[0]
_IMPORTS = "import torch\nimport torch.nn as nn\nimport torch.nn.functional as F\n"
exec(compile(_IMPORTS + _TEXT, str(_EXAMPLE), "exec"), {"__name__": __name__})
