"""The command ``oftfx``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from oftfx.errors import MissingExtraError, OftfxError

try:
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
except ImportError as _error:
    sys.exit(str(MissingExtraError(_error.name or "typer", "cli", "The command line")))

from oftfx.serving.command import repository

app = typer.Typer(
    name="oftfx",
    help="Put orthogonal fine-tuning rotations into any model, fold them, deploy a plain model.",
    no_args_is_help=True,
    add_completion=False,
)
console = Console(highlight=False, soft_wrap=True)
app.command()(repository)


@app.command()
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


@app.command()
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


@app.command()
def plan(
    model: Annotated[Path, typer.Argument(help="Directory with a transformers config.json.")],
    rules: Annotated[str, typer.Option(help="'all-linear' or a .toml file with [[rule]] tables.")] = "all-linear",
    block_size: Annotated[int | None, typer.Option(min=1, help="Block size for 'all-linear'.")] = None,
    full: Annotated[bool, typer.Option("--full", help="One row a site.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what a transform would do, from the model's config alone: no weights are loaded."""
    import oftfx

    asked: Any = {"all-linear": oftfx.OFT(block_size)} if block_size and rules == "all-linear" else rules
    result = oftfx.plan(_meta_model(model), asked)
    print(result.to_json() if json else result.table(full=full))  # noqa: T201


@app.command()
def version() -> None:
    """Print the version."""
    import oftfx

    print(oftfx.__version__)  # noqa: T201


def _meta_model(directory: Path) -> Any:
    import torch

    if not (directory / "config.json").is_file():
        raise OftfxError(f"{directory} has no config.json; expected a directory that transformers saved a model to")
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "Planning from a config") from error
    config = transformers.AutoConfig.from_pretrained(directory)
    name = (config.architectures or ["AutoModel"])[0]
    with torch.device("meta"):
        return (
            getattr(transformers, name)(config) if name != "AutoModel" else transformers.AutoModel.from_config(config)
        )


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


def main() -> None:
    """Entry point: errors of ours are one line, not a traceback."""
    try:
        app()
    except OftfxError as error:
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("interrupted; start the same command again to continue")
        sys.exit(130)


if __name__ == "__main__":
    main()
