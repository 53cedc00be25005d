"""The command itself: its parts, and what becomes of errors."""

from __future__ import annotations

import sys

from oftfx.errors import MissingExtraError, OftfxError

try:
    import typer
    from rich.console import Console
except ImportError as _error:
    sys.exit(str(MissingExtraError(_error.name or "typer", "cli", "The command line")))

from oftfx.cli.demo import demo, ocr
from oftfx.cli.fold import fold
from oftfx.cli.plan import plan
from oftfx.cli.repository import repository
from oftfx.version import __version__

app = typer.Typer(
    name="oftfx",
    help="Put orthogonal fine-tuning rotations into any model, fold them, deploy a plain model.",
    no_args_is_help=True,
    add_completion=False,
)
for _command in (fold, repository, demo, ocr, plan):
    app.command()(_command)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point: errors of ours are one line, not a traceback."""
    try:
        app()
    except OftfxError as error:
        console = Console(highlight=False, soft_wrap=True)
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        console = Console(highlight=False, soft_wrap=True)
        console.print("interrupted; start the same command again to continue")
        sys.exit(130)
