"""Reference entries for all public names of a package: a line ``::: every name of oftfx.passes`` in a page."""

import importlib
import re
from typing import Any

_LINE = re.compile(r"^::: every name of (\S+)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """One ``:::`` line for each name in ``__all__``."""
    return _LINE.sub(lambda found: "\n\n".join(f"::: {name}" for name in public_names(found[1])), markdown)


def public_names(package: str) -> list[str]:
    """Full names, in the order of ``__all__`` where that is a sequence."""
    return [f"{package}.{name}" for name in importlib.import_module(package).__all__ if not name.startswith("__")]
