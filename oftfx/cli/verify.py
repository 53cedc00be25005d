"""The command ``oftfx verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oftfx.cli import show
from oftfx.cli.options import Dtype, Json, Quiet, Threads, use_threads


def verify(
    subject: Annotated[
        str,
        typer.Argument(
            help="What was made: a checkpoint directory, an .onnx file, or http://HOST:PORT.", show_default=False
        ),
    ],
    base: Annotated[Path, typer.Option(help="The model it was made of, with its tokenizer.", show_default=False)],
    adapter: Annotated[
        Path | None, typer.Option(help="The adapter that it should have; without: the base itself.", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option(help="Of a server: the model's name there.", show_default=False)] = "",
    served_adapter: Annotated[
        str, typer.Option(help="Of a server: the name by which a request chooses the adapter.", show_default=False)
    ] = "",
    adapter_file: Annotated[
        Path | None,
        typer.Option(help="Of a swappable .onnx file: the .onnx_adapter to run it with.", show_default=False),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; may be repeated. Four of ours without.", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens to compare, after each prompt.")] = 32,
    tie: Annotated[float, typer.Option(min=0.0, help="Margins of logits that rounding may decide.")] = 1e-3,
    dtype: Dtype = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Does it say what the base with the adapter says? Tokens of a checkpoint, an ONNX file or a running server.

    The base and the unfolded adapter run here, in torch; what they say token for token is what is expected, and the
    base's own answers show whether an adapter is missing. Ends with status 3 where it says something else.
    """
    from oftfx.evaluation.verify import verify as compare

    use_threads(threads)
    with show.counted("verify", quiet=quiet or json) as progress:
        found = compare(
            subject,
            base,
            adapter,
            model=model,
            served_adapter=served_adapter,
            adapter_file=adapter_file,
            prompts=prompt or (),
            count=tokens,
            tie=tie,
            dtype=dtype,
            progress=progress,
        )
    show.result(found.to_json() if json else found.table())
    if not found.is_equal:
        raise typer.Exit(show.DIFFERENT)
