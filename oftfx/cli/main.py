"""The command itself: its parts, and what becomes of errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

from oftfx.errors import MissingExtraError

try:
    import typer

    from oftfx.cli import show
except ImportError as _error:
    sys.exit(str(MissingExtraError(_error.name or "typer", "cli", "The command line")))

from oftfx.cli.adapters import convert, diff, merge, to_lora
from oftfx.cli.bench import bench
from oftfx.cli.demo import demo, ocr, sample
from oftfx.cli.doctor import doctor
from oftfx.cli.evaluate import evaluate
from oftfx.cli.export import export, export_adapter, genai, gguf, openvino
from oftfx.cli.fold import fold
from oftfx.cli.generate import generate
from oftfx.cli.inspect import inspect
from oftfx.cli.plan import plan
from oftfx.cli.quantize import quantize
from oftfx.cli.report import card, report
from oftfx.cli.repository import repository
from oftfx.cli.train import train
from oftfx.cli.unfold import unfold
from oftfx.cli.verify import verify
from oftfx.version import __version__

HELP = """
Orthogonal fine-tuning (OFT), from a base model and an adapter to a model that is served.

Exit status: 0 done; 1 an error, which is named; 2 wrong arguments; 3 compared, and not the same; 130 interrupted.
"""
PARTS: dict[str, dict[str, Callable[..., None]]] = {
    "Make": {"quantize": quantize, "train": train, "fold": fold, "unfold": unfold},
    "Adapters": {"convert": convert, "merge": merge, "diff": diff, "to-lora": to_lora},
    "Look and check": {
        "plan": plan,
        "inspect": inspect,
        "verify": verify,
        "eval": evaluate,
        "bench": bench,
        "doctor": doctor,
    },
    "Tell": {"report": report, "card": card},
    "Serve": {
        "export": export,
        "export-adapter": export_adapter,
        "genai": genai,
        "openvino": openvino,
        "gguf": gguf,
        "repository": repository,
    },
    "Try": {"generate": generate, "demo": demo, "ocr": ocr, "sample": sample},
}

app = typer.Typer(
    name="oftfx",
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _panel, _commands in PARTS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_panel)(show.guarded(_command))


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"oftfx {__version__}")
        raise typer.Exit


@app.callback()
def _all(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point."""
    show.show_warnings()
    # Nothing is ever fetched: what a command reads is what its user names.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # there are bars of ours
    try:
        app()
    except OSError as error:  # of what typer writes itself, help and version
        show.refused(error)
        sys.exit(show.FAILED)
