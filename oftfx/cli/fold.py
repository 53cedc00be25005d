"""The command ``oftfx fold``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oftfx.cli import show
from oftfx.cli.options import (
    Adapter,
    Base,
    Convention,
    DryRun,
    Html,
    Json,
    Part,
    Quiet,
    Sequence,
    Text,
    Threads,
    Tokens,
    use_threads,
)

if TYPE_CHECKING:
    from oftfx.folding.report import FoldReport


def fold(
    base: Base,
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(help="Directory for the result.", show_default=False)],
    quantized: Annotated[
        str | None,
        typer.Option(
            help="Quantized layers: keep (default), requantize, calibrate, float, reference.", show_default=False
        ),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="The original float checkpoint, for 'reference'.", show_default=False)
    ] = None,
    calibration: Text = None,
    tokens: Tokens = 8192,
    sequence: Sequence = 512,
    distil: Annotated[int, typer.Option(min=0, help="Passes over them in which the scales learn; in memory.")] = 0,
    into: Annotated[
        str, typer.Option(help="'site', or 'producer': into the layer before, where exact; in memory.")
    ] = "site",
    save_as: Annotated[
        str | None,
        typer.Option(
            help="compressed-tensors, gptq or awq: the same integers in that form; in memory.", show_default=False
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(help="'vllm': write only what it reads, or say what does; in memory.", show_default=False),
    ] = None,
    rotations: Annotated[
        str | None,
        typer.Option(help="For a server, of 'keep': 'code' beside the weights, or 'transforms'.", show_default=False),
    ] = None,
    in_memory: Annotated[
        bool, typer.Option("--in-memory", help="Load the whole model, and measure its output.")
    ] = False,
    hidden_states: Annotated[str, typer.Option(help="Of the calibration texts: memory, or disk (slower).")] = "memory",
    convention: Convention = None,
    part: Part = None,
    name: Annotated[str, typer.Option(help="Of the adapter, for the report.")] = "default",
    html: Html = None,
    force: Annotated[bool, typer.Option("--force", "--overwrite", help="Replace an earlier result in OUT.")] = False,
    dry_run: DryRun = False,
    threads: Threads = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Fold an adapter into a checkpoint, from files to files, without the model in memory.

    Prints what was done to each layer, and whether the adapter arrived. With --quantized calibrate the model runs on
    the texts, layer by layer, with the weights of one decoder layer in memory at a time. Options that say so load the
    whole model; so does an adapter whose scales were trained for its fold, and a file of another tool with more in it
    than rotations.
    Interrupted, killed or out of room, the same command goes on where it was.
    Started by torchrun (torchrun --nproc-per-node 4 -m oftfx fold ...), the processes share the work, but for what is
    calibrated, which the first one does.
    """
    from oftfx.adapter.scales import SCALE_FILE
    from oftfx.streaming.given import NeedsWeightsError

    use_threads(threads)
    show.check_page(html, force=force)
    trained = quantized is None and (adapter / SCALE_FILE).is_file()
    whole: Any = in_memory or distil or into != "site" or save_as or server or rotations or trained
    options: dict[str, Any] = {"quantized": quantized, "reference": reference}
    file = {"convention": convention, "part": part}
    if not whole:
        more: dict[str, Any] = {"hidden_states": hidden_states, "name": name, "overwrite": force, **file}
        texts = (calibration, tokens, sequence)
        try:
            report = _by_files(base, adapter, out, options, more, texts, dry_run, quiet or json)
        except NeedsWeightsError as error:
            show.say(f"{error}. It is folded in memory now")
            whole = True
    if whole:
        inputs = _texts(base, calibration, tokens, sequence)
        more = {"distil": distil, "into": into, "name": name, "trained": trained, "file": file}
        report = _in_memory(
            base,
            adapter,
            out,
            {**options, "calibration": inputs},
            more,
            {"save_as": save_as, "server": server, "rotations": rotations},
            force,
            dry_run,
            quiet or json,
        )
    if report is None:
        return
    show.end(report, report.to_json() if json else report.table(), html)


def _texts(base: Path, file: Path | None, tokens: int, sequence: int) -> Any:
    from oftfx.streaming.texts import calibration_from

    return None if file is None else calibration_from(base, file, tokens, sequence)


def _by_files(
    base: Path,
    adapter: Path,
    out: Path,
    options: dict[str, Any],
    more: dict[str, Any],
    texts: tuple[Path | None, int, int],
    dry_run: bool,
    quiet: bool,
) -> FoldReport | None:
    from oftfx.streaming.directory_fold import check_fold, fold_checkpoint
    from oftfx.streaming.memory import let_large_tensors_go

    name, options = more.pop("name"), {**options, **more}
    if texts[0] is not None:
        let_large_tensors_go()
        options["calibration"] = _texts(base, *texts)
    if dry_run:
        job = check_fold(base, adapter, out, **options)
        job.check_room()
        show.result(job.summary())
        return None
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    report = fold_checkpoint(base, adapter, out, **options, name=name, distributed=distributed, progress=not quiet)
    return None if int(os.environ.get("RANK", "0")) else report  # the first process says it


def _in_memory(
    base: Path,
    adapter: Path,
    out: Path,
    options: dict[str, Any],
    more: dict[str, Any],
    kind: dict[str, Any],
    force: bool,
    dry_run: bool,
    quiet: bool,
) -> FoldReport | None:
    from oftfx.adapter.folded import NOTE, companions, own_files, save_folded
    from oftfx.adapter.load import load_adapter
    from oftfx.adapter.switch import set_adapter
    from oftfx.errors import FoldError
    from oftfx.files import check_place
    from oftfx.foldaware import fold_aware
    from oftfx.folds import fold as fold_model
    from oftfx.opened import open_model

    check_place(out / NOTE, FoldError)
    if own_files(out) and not force:
        raise show.OutputError(f"{out} holds an earlier result; choose another place, or replace it: --force")
    name, trained = more.pop("name"), more.pop("trained")
    model = load_adapter(open_model(base), adapter, adapter=name, **more.pop("file"))
    set_adapter(model, name)
    if trained:
        awareness = fold_aware(model, "calibrate", adapter=name, calibration=adapter)
        show.say(f"{awareness.sites} layers have codes and scales that were trained for this fold")
    if dry_run:
        show.result(f"{adapter} fits {base}; it would be folded in memory and written to {out}")
        return None
    with show.counted("fold", quiet=quiet) as progress:
        done = fold_model(model, **options, **more, inplace=True, progress=progress or False)
    save_folded(done.model, done.report, out, **kind, beside=companions(base))
    return done.report
