"""The commands ``oftfx demo`` and ``oftfx ocr``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from oftfx.cli import show
from oftfx.cli.options import Force, Threads, use_threads


def demo(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, ONNX files and figures.")] = Path("oftfx-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A small run of about four minutes.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps (60, or 6 with --quick).")] = None,
    threads: Threads = None,
) -> None:
    """Run the main job on SmolLM2-135M: NF4 base, train, fold each way, export, run in ONNX Runtime.

    Needs the extra 'demo' and two data packages; no network. Interrupt it and start it again: it continues.
    """
    from oftfx.demo.job import FULL, QUICK, Job
    from oftfx.terminal import remark_bar

    use_threads(threads)
    size = QUICK if quick else FULL
    folder = out / ("quick" if quick else "full")
    Job(folder, replace(size, steps=steps or size.steps), show.result, remark_bar).run()


def ocr(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and figures.")] = Path("oftfx-ocr"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps and test words.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps (100, or 20 with --quick).")] = None,
    threads: Threads = None,
) -> None:
    """Teach a convolution network with real weights to read bad scans, and fold what it learnt; two minutes.

    Needs the extra 'demo' and two data packages; no network. Interrupt it and start it again: it continues.
    """
    from oftfx.demo import ocr_job
    from oftfx.terminal import remark_bar

    use_threads(threads)
    ocr_job.run(out / ("quick" if quick else "full"), steps, quick, show.result, remark_bar)


def sample(
    out: Annotated[Path, typer.Argument(help="Directory to write to.", show_default=False)],
    force: Force = False,
) -> None:
    """Write a small real model and real texts, to try the other commands on: SmolLM2-135M-Instruct and news articles.

    OUT/base, OUT/train.jsonl and OUT/held_out.jsonl. Needs the extra 'demo' and two data packages; no network.
    """
    from oftfx.demo.sample import write_sample

    show.check_new(out, force=force)
    with show.waiting("read SmolLM2-135M-Instruct", quiet=False):
        write_sample(out)
    show.result(f"{out}: base, train.jsonl, held_out.jsonl")
