"""The command ``oftfx fold``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer


def fold(
    base: Annotated[Path, typer.Argument(help="Checkpoint: config.json with model.safetensors, or shards and index.")],
    adapter: Annotated[Path, typer.Argument(help="Adapter directory of oftfx or PEFT (OFT).")],
    out: Annotated[Path, typer.Argument(help="Directory for the result.")],
    quantized: Annotated[
        str | None, typer.Option(help="Quantized layers: keep (default), requantize, calibrate, float or reference.")
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="The original float checkpoint, for 'reference'.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help='Texts for \'calibrate\': .jsonl with "text" or "messages", or plain text.'),
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens of them to use.")] = 8192,
    sequence: Annotated[int, typer.Option(help="Tokens of one sequence.")] = 512,
    hidden_states: Annotated[
        str, typer.Option(help="Where the hidden states of these texts are kept: memory, or disk (slower).")
    ] = "memory",
    name: Annotated[str, typer.Option(help="Of the adapter, for the report.")] = "default",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in OUT.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and no progress.")] = False,
) -> None:
    """Fold an adapter into a checkpoint, without the model in memory.

    Prints what was done to each layer. With --quantized calibrate the model runs on the texts, layer by layer, with
    the weights of one decoder layer in memory at a time.
    Interrupted, killed or out of room, the same command goes on where it was.
    Started by torchrun (torchrun --nproc-per-node 4 -m oftfx.cli fold ...), the processes share the work, but for what
    is calibrated, which the first one does.

    Exit status: 0 when all files are in OUT; 1 after an error, which is named; 2 for wrong arguments; 130 when
    interrupted.
    """
    from oftfx.streaming.directory_fold import check_fold, fold_checkpoint
    from oftfx.streaming.memory import let_large_tensors_go
    from oftfx.streaming.texts import calibration_from

    options: dict[str, Any] = {"quantized": quantized, "reference": reference, "overwrite": overwrite}
    if calibration is not None:
        let_large_tensors_go()
        inputs = calibration_from(base, calibration, tokens, sequence)
        options |= {"calibration": inputs, "hidden_states": hidden_states}
    if dry_run:
        job = check_fold(base, adapter, out, **options)
        job.check_room()
        typer.echo(job.summary())
        return
    try:
        report = fold_checkpoint(
            base,
            adapter,
            out,
            **options,
            name=name,
            distributed=int(os.environ.get("WORLD_SIZE", "1")) > 1,
            progress=not json,
        )
    except KeyboardInterrupt:  # which typer itself would call an abort
        typer.echo("interrupted; start the same command again to continue")
        raise typer.Exit(130) from None
    if int(os.environ.get("RANK", "0")):
        return  # the first process says it
    typer.echo(report.to_json() if json else report.table(), nl=json)
