"""The command ``oftfx quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oftfx.cli import show
from oftfx.cli.options import Base, DryRun, Force, Html, Json, Quiet, Sequence, Text, Threads, Tokens, use_threads


def quantize(
    model: Base,
    out: Annotated[Path, typer.Argument(help="Directory for the result.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(help="int4 or int8 (compressed-tensors, which vLLM reads); nf4, fp4 or llm.int8 (bitsandbytes)."),
    ] = "int4",
    group_size: Annotated[int, typer.Option(help="Columns that share a scale, of int4 and int8; -1: all.")] = 32,
    calibration: Text = None,
    tokens: Tokens = 8192,
    sequence: Sequence = 512,
    dtype: Annotated[str, typer.Option(help="Of what stays float: auto, float32, bfloat16, float16.")] = "auto",
    html: Html = None,
    force: Force = False,
    dry_run: DryRun = False,
    threads: Threads = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Round the linear layers of a float model, all but its output head.

    With --calibration, int4 and int8 are rounded so that each layer's outputs on these texts change least; the others
    have nothing to choose. Before training: a base to train an adapter on. After a fold to floats: a model to serve.
    """
    from oftfx.adapter.folded import NOTE, companions, own_files, save_folded
    from oftfx.errors import FoldError
    from oftfx.files import check_place
    from oftfx.opened import open_bare, open_model
    from oftfx.quantizing import quantize as rounded
    from oftfx.quantizing_bnb import quantize_bnb
    from oftfx.streaming.texts import calibration_from

    use_threads(threads)
    show.check_page(html, force=force)
    bits = {"int4": 4, "int8": 8}
    if to not in (*bits, "nf4", "fp4", "llm.int8"):
        raise show.OutputError(f"--to {to}: expected int4, int8, nf4, fp4 or llm.int8")
    if to not in bits and calibration is not None:
        raise show.OutputError(f"--to {to}: its rounding has nothing to choose, so --calibration would do nothing")
    check_place(out / NOTE, FoldError)
    if own_files(out) and not force:
        raise show.OutputError(f"{out} holds an earlier result; choose another place, or replace it: --force")
    inputs = None if calibration is None else calibration_from(model, calibration, tokens, sequence)
    if dry_run:
        open_bare(model)
        show.result(f"{model} would be rounded to {to} and written to {out}")
        return
    with show.counted("quantize", quiet=quiet or json) as progress:
        if to in bits:
            base = open_model(model, dtype=dtype)
            done = rounded(base, bits=bits[to], group_size=group_size, calibration=inputs, progress=progress or False)
        else:
            done = quantize_bnb(model, to, dtype=dtype)
    save_as = "compressed-tensors" if to in bits else None
    save_folded(done.model, done.report, out, save_as=save_as, beside=companions(model))
    show.end(done.report, done.report.to_json() if json else str(done.report), html)
