"""The command ``oftfx eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oftfx.cli import show
from oftfx.cli.options import Base, Dtype, Json, Quiet, Threads, use_threads

if TYPE_CHECKING:
    from oftfx.evaluation.perplexity import Logits


def evaluate(
    base: Base,
    text: Annotated[Path, typer.Option(help="Held-out texts: .jsonl, or plain text.", show_default=False)],
    adapter: Annotated[Path | None, typer.Option(help="An adapter, evaluated unfolded.", show_default=False)] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option(help="A folded checkpoint or an .onnx file; may be repeated.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens of the texts to use.")] = 4096,
    sequence: Annotated[int, typer.Option(min=2, help="Tokens of one sequence.")] = 256,
    rounds: Annotated[int, typer.Option(min=0, help="How often a forward is timed; 0: not at all.")] = 5,
    dtype: Dtype = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Base, adapter and what was made of them side by side: perplexity, agreement, speed, size.

    All of them run over the same tokens; times are medians of forwards in turn, to the base's.
    """
    import torch

    from oftfx.evaluation.evaluate import evaluate as side_by_side
    from oftfx.opened import open_tokenizer
    from oftfx.streaming.texts import blocks, read_texts

    use_threads(threads)
    tokenizer = open_tokenizer(base)
    data = blocks(tokenizer, read_texts(text, tokenizer), sequence)[: max(1, tokens // sequence)]
    if not len(data):
        raise show.OutputError(f"{text}: there is less than one sequence of {sequence} tokens in it")
    models, sizes = _opened(base, adapter, also or [], dtype)
    adapted = "adapter" if adapter is not None else None
    with torch.no_grad(), show.phases(quiet=quiet or json) as report:
        found = side_by_side(models, data, adapted=adapted, nbytes=sizes, rounds=rounds, report=report)
    show.result(found.to_json() if json else found.table())


def _opened(base: Path, adapter: Path | None, also: list[Path], dtype: str) -> tuple[dict[str, Logits], dict[str, int]]:
    from oftfx.adapter.load import load_adapter
    from oftfx.evaluation.evaluate import file_bytes, stored_bytes
    from oftfx.evaluation.graphs import graph_logits
    from oftfx.evaluation.perplexity import in_torch
    from oftfx.model.structure import structural_copy
    from oftfx.opened import open_model

    plain = open_model(base, dtype=dtype)
    models: dict[str, Logits] = {"base": in_torch(plain)}
    sizes = {"base": stored_bytes(plain)}
    if adapter is not None:
        model = load_adapter(structural_copy(plain), adapter)
        models["adapter"] = in_torch(model)
        sizes["adapter"] = stored_bytes(model)
    for path in also:
        name = path.name if path.name not in models else str(path)
        if path.suffix == ".onnx":
            models[name], sizes[name] = graph_logits(path), file_bytes(path)
        else:
            made = open_model(path)
            models[name], sizes[name] = in_torch(made), stored_bytes(made)
    return models, sizes
