"""Options that several commands have, with one name and one meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Base = Annotated[Path, typer.Argument(help="Model: a directory with config.json and safetensors.", show_default=False)]
Adapter = Annotated[
    Path, typer.Argument(help="Adapter: a directory of oftfx or PEFT, or a file of another tool.", show_default=False)
]
Convention = Annotated[
    str | None,
    typer.Option("--from", help="What the adapter's file is, where that leaves a choice.", show_default=False),
]
Part = Annotated[
    str | None, typer.Option(help="Of a file for several models: the prefix of this one's keys.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, write nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is in the place of the result.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.", show_default=False)]
Text = Annotated[
    Path | None,
    typer.Option(
        help='Texts: .jsonl with "text" or "messages", or plain text with an empty line between two.',
        show_default=False,
    ),
]
Tokens = Annotated[int, typer.Option(min=1, help="How many tokens of the calibration texts to use.")]
Sequence = Annotated[int, typer.Option(min=1, help="Tokens of one sequence.")]
Dtype = Annotated[str, typer.Option(help="Of the base: auto, float32, bfloat16, float16.")]
Html = Annotated[Path | None, typer.Option(help="Write the report as one HTML file as well.", show_default=False)]


def use_threads(count: int | None) -> None:
    """Let torch take so many."""
    if count:
        import torch

        torch.set_num_threads(count)
