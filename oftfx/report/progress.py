"""A progress bar by `rich`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from oftfx.errors import MissingExtraError

Report = Callable[[int, int], None]


@contextmanager
def bar(title: str) -> Iterator[Report]:
    """Show progress on standard error for as long as the block runs; it gets a function of (done, all).

    Raises:
        MissingExtraError: `rich` is not installed.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining
    except ImportError as error:
        raise MissingExtraError("rich", "report", "A progress bar") from error
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), Remaining())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
