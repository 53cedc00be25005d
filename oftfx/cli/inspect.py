"""The command ``oftfx inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oftfx.cli import show
from oftfx.cli.options import Json


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="An adapter, checkpoint, .onnx or .onnx_adapter file, plan, report, training run or repository.",
            show_default=False,
        ),
    ],
    json: Json = False,
) -> None:
    """What is in it: layers, sizes, formats, hashes, what was folded, and what does not fit together.

    Ends with status 3 where something is wrong with it.
    """
    from oftfx.inspecting.inspect import inspect as look

    found = look(path)
    show.result(found.to_json() if json else str(found))
    if found.faults:
        raise typer.Exit(show.DIFFERENT)
