"""The command ``oftfx train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from oftfx.cli import show
from oftfx.cli.options import DryRun, Json, Quiet, Threads, use_threads


def train(
    out: Annotated[Path, typer.Argument(help="Directory of the run: recipe, progress, adapter.", show_default=False)],
    recipe: Annotated[
        Path | None, typer.Option(help="A TOML file with any of what follows; options win.", show_default=False)
    ] = None,
    base: Annotated[str | None, typer.Option(help="Model: a directory, also quantized.", show_default=False)] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help='.jsonl with "text", "messages" or "prompt" and "completion"; plain text; or a folder of images: a '
            "folder for each class.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Layers: names as in PEFT, or globs. [all-linear]", show_default=False)
    ] = None,
    rules: Annotated[
        str | None, typer.Option(help="Instead: a .toml of rules or an adapter_config.json.", show_default=False)
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Of the rotations. [32]", show_default=False)] = None,
    share_input: Annotated[
        bool | None, typer.Option("--share-input", help="One rotation for layers that read the same.")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Of blocks. [0]", show_default=False)] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16, float16. [auto]", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ... [auto]", show_default=False)] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens of a row at most. [512]", show_default=False)] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a forward. [4]", show_default=False)] = None,
    accumulate: Annotated[int | None, typer.Option(help="Forwards of a step. [1]", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; by --epochs without.", show_default=False)] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data. [1]", show_default=False)] = None,
    rate: Annotated[float | None, typer.Option(help="Largest learning rate. [2.5e-4]", show_default=False)] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Share of the steps in which it rises. [0.1]", show_default=False)
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW. [0]", show_default=False)] = None,
    clip: Annotated[
        float | None, typer.Option(help="Largest norm of the gradient; 0: any. [1]", show_default=False)
    ] = None,
    fold_aware: Annotated[
        int | None,
        typer.Option(help="Steps after these that train the scales of the folded codes. [0]", show_default=False),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Of the data, for these. [8192]", show_default=False)
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="A file to measure on; else the last rows.", show_default=False)
    ] = None,
    held_out_rows: Annotated[int | None, typer.Option(help="How many. [16]", show_default=False)] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the order of rows, and of dropout. [0]", show_default=False)
    ] = None,
    every: Annotated[
        int | None, typer.Option(help="Steps between what is written to disk. [10]", show_default=False)
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = None,
    dry_run: DryRun = False,
    threads: Threads = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train an OFT adapter on texts, conversations, prompts with completions, or images with their classes.

    Only an assistant's turns, and completions, are learnt. All options together are written as OUT/oftfx_train.toml,
    which --recipe reads. The adapter is OUT/adapter, in the files of PEFT.
    Interrupted or killed, the same command goes on where it was, to the same numbers. OUT alone is enough to go on.
    """
    given = dict(locals())
    from oftfx.training.job import in_words, start
    from oftfx.training.recipe import FILE, Recipe

    use_threads(threads)
    options = {n: given[n] for n in Recipe.__dataclass_fields__ if given[n] is not None}
    if recipe is None and not options and (out / FILE).is_file():
        recipe = out / FILE
    made = Recipe.of(options, "train") if recipe is None else Recipe.read(recipe, **options)
    run = start(made, out, show.say, show.bars(quiet=quiet or json))
    if dry_run:
        plan = run.check()
        show.result(plan.to_json() if json else f"{len(plan)} sites, {plan.trainable:,} parameters; ready to train")
        return
    result: dict[str, Any] = run.run()
    if json:
        import json as as_json

        show.result(as_json.dumps(result))
        return
    for when, found in result.get("held_out", {}).items():
        show.result(f"held out {when}: {in_words(found)}")
