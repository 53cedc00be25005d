"""The command ``oftfx unfold``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oftfx.cli import show
from oftfx.cli.options import Force


def unfold(
    folded: Annotated[Path, typer.Argument(help="A folded checkpoint of ours.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Directory for the base.", show_default=False)],
    force: Force = False,
) -> None:
    """Bring the base back from a fold that has kept its weights: 'keep', where the rotations stand in front.

    Bit for bit. Other folds have rounded, or changed floats, and the base cannot be made of them again: it is where you
    folded it from.
    """
    from oftfx.adapter.base_again import base_again

    show.check_new(out, force=force)
    count = base_again(folded, out)
    show.result(f"{out}: the base, without its {count} rotations")
