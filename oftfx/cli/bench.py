"""The command ``oftfx bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oftfx.cli import show
from oftfx.cli.options import Base, Dtype, Json, Quiet, Threads, use_threads

if TYPE_CHECKING:
    import torch.nn as nn


def bench(
    base: Base,
    adapter: Annotated[
        list[Path] | None, typer.Option(help="An adapter, unfolded; may be repeated.", show_default=False)
    ] = None,
    also: Annotated[
        list[Path] | None, typer.Option(help="A folded checkpoint; may be repeated.", show_default=False)
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a training step, of as many tokens.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 7,
    dtype: Dtype = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """What an adapter costs here: a prompt, a token, a training step, beside the base and folded checkpoints.

    All models run in turn, in every round in another order; a ratio is the median of its rounds' ratios. `eval` has
    what they are worth.
    """
    from oftfx.adapter.load import load_adapter
    from oftfx.evaluation.evaluate import stored_bytes
    from oftfx.evaluation.speed import speeds
    from oftfx.model.structure import structural_copy
    from oftfx.opened import open_model

    use_threads(threads)
    with show.waiting("open the models", quiet=quiet or json):
        models: dict[str, nn.Module] = {"base": open_model(base, dtype=dtype).requires_grad_(False)}
        for path in adapter or []:
            models[_new(path, models)] = load_adapter(structural_copy(models["base"]), path, trainable=True)
        for path in also or []:
            models[_new(path, models)] = open_model(path).requires_grad_(False)
    sizes = {name: stored_bytes(model) for name, model in models.items()}
    with show.phases(quiet=quiet or json) as report:
        found = speeds(models, prompt=prompt, batch=batch, rounds=rounds, nbytes=sizes, report=report)
    for row in found.rows:
        for work, reason in row.why_not.items():
            show.say(f"{row.name}: no {work}: {reason}")
    show.result(found.to_json() if json else found.table())


def _new(path: Path, known: dict[str, nn.Module]) -> str:
    return path.name if path.name and path.name not in known else str(path)
