"""The JavaScript that a page brings along, out of the packages that carry it."""

from __future__ import annotations

import base64
import importlib.util
from functools import cache
from importlib.metadata import version
from pathlib import Path

from oftfx.errors import MissingExtraError


@cache
def vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script, which defines ``vegaEmbed``; some 0.9 MB, made once a process.

    Raises:
        MissingExtraError: ``vl-convert-python`` is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise MissingExtraError("vl-convert-python", "report", "An HTML report") from error
    return inline(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", "6.4"))


@cache
def datatables() -> str:
    """DataTables with its extensions as the address of a module, ``data:...``; some 0.8 MB.

    Raises:
        MissingExtraError: ``itables`` is not installed, or not as it was when this was written.
    """
    found = importlib.util.find_spec("itables")  # which is not imported: it would look for pandas
    file = Path(found.submodule_search_locations[0]) / "html/dt_bundle.js" if _is_package(found) else None  # type: ignore[union-attr, index]
    if file is None or not file.is_file():
        raise MissingExtraError("itables", "report", "An HTML report")
    return "data:text/javascript;base64," + base64.b64encode(file.read_bytes()).decode()


def notices() -> str:
    """Whose scripts they are."""
    return (
        f"Vega, Vega-Lite, vega-embed (BSD-3-Clause, University of Washington Interactive Data Lab and contributors), "
        f"by vl-convert-python {version('vl-convert-python')}; DataTables and jQuery (MIT, SpryMedia Limited; OpenJS "
        f"Foundation and contributors), by itables {version('itables')}"
    )


def inline(script: str) -> str:
    """A script that can stand inside of a page: nothing in it ends the element, or opens a comment."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _is_package(found: object) -> bool:
    return bool(getattr(found, "submodule_search_locations", None))
