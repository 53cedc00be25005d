"""The commands ``oftfx demo`` and ``oftfx ocr``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(highlight=False, soft_wrap=True)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, ONNX files and figures.")] = Path("oftfx-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A small run of about four minutes.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps (60, or 6 with --quick).")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")] = None,
) -> None:
    """Run the main job on SmolLM2-135M: NF4 base, train, fold each way, export, run in ONNX Runtime.

    Needs the extra 'demo' and two data packages; no network. Interrupt it and start it again: it continues.
    """
    import torch

    from oftfx.demo.job import FULL, QUICK, Job

    if threads:
        torch.set_num_threads(threads)
    size = QUICK if quick else FULL
    folder = out / ("quick" if quick else "full")
    Job(folder, replace(size, steps=steps or size.steps), console.print, _bar).run()


def ocr(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and figures.")] = Path("oftfx-ocr"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps and test words.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps (100, or 20 with --quick).")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.")] = None,
) -> None:
    """Teach a convolution network with real weights to read bad scans, and fold what it learnt; two minutes.

    Needs the extra 'demo' and two data packages; no network. Interrupt it and start it again: it continues.
    """
    import torch

    from oftfx.demo import ocr_job

    if threads:
        torch.set_num_threads(threads)
    ocr_job.run(out / ("quick" if quick else "full"), steps, quick, console.print, _bar)


@contextmanager
def _bar(title: str, total: int) -> Iterator[Any]:
    if not console.is_terminal:  # a log: a line for every tenth instead of a bar
        tenths = {max(1, total * i // 10) for i in range(1, 11)}
        yield lambda done, remark: console.print(f"{title}: {done}/{total} {remark}") if done in tenths else None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, remark="")
        yield lambda done, remark: progress.update(task, completed=done, remark=remark)
