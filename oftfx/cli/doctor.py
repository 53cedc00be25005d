"""The command ``oftfx doctor``."""

from __future__ import annotations

import typer

from oftfx.cli import show
from oftfx.cli.options import Json, Quiet


def doctor(quiet: Quiet = False, json: Json = False) -> None:
    """What is installed, what each missing package is for, and which weight formats work here: each is tried.

    Ends with status 3 where something that is installed does not work.
    """
    from oftfx.inspecting.installation import look

    with show.counted("try formats", quiet=quiet or json) as progress:
        found = look(progress)
    show.result(found.to_json() if json else str(found))
    if not found.is_sound:
        raise typer.Exit(show.DIFFERENT)
