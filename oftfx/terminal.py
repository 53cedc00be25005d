"""Tables and progress bars, by `rich`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from oftfx.errors import MissingExtraError


def render(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, width: int | None = None) -> str:
    """A table as text; columns whose cells look like numbers are aligned to the right.

    Args:
        title: line above the table.
        columns: headings.
        rows: cells, one a column.
        width: characters a line; the terminal's where None, and never cut where there is no terminal.

    Raises:
        MissingExtraError: `rich` is not installed.
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise MissingExtraError("rich", "report", "A table") from error
    cells = [[plain(str(cell)) for cell in row] for row in rows]
    console = Console(width=width or max(Console().width, 160 if not Console().is_terminal else 0))
    if cells and _needed(columns, cells) > console.width:
        return _narrow(title, columns, cells, console.width)
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(_is_number(r[index]) for r in cells)
        last = index == len(columns) - 1
        table.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=not last)
    for row in cells:
        table.add_row(*map(Text, row))  # as they are: brackets are no markup
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip() + "\n"


def plain(text: str) -> str:
    """Text of a file as a terminal can show it: what would command it, or is no character, by its number."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def _needed(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> int:
    """Characters of a line in which no word has to be broken; only a last column of sentences may wrap."""
    widths = []
    for index, column in enumerate(columns):
        words = [column, *(r[index] for r in cells)]
        if index == len(columns) - 1:
            words = [part for word in words for part in word.split()] or [""]
        widths.append(max(map(len, words)))
    return sum(widths) + 3 * len(columns)


def _narrow(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> str:
    """Where the lines are too short for a table: each row by itself, what it has under its headings."""
    lines = [title, ""]
    for first, *rest in cells:
        said = [f"{name}: {cell}" for name, cell in zip(columns[1:], rest, strict=True) if cell not in ("", "-")]
        lines += [first, *textwrap.wrap(", ".join(said), initial_indent="  ", subsequent_indent="  ", width=width), ""]
    return "\n".join(lines).rstrip() + "\n"


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell[:1].isdigit() or cell[:1] in "+-."


Advance = Callable[[int, int], None]


@contextmanager
def bar(title: str) -> Iterator[Advance]:
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


@contextmanager
def byte_bar(title: str) -> Iterator[Advance]:
    """The same for bytes, with their rate and the time left.

    Raises:
        MissingExtraError: `rich` is not installed.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
        from rich.progress import TimeRemainingColumn as Remaining
    except ImportError as error:
        raise MissingExtraError("rich", "report", "A progress bar") from error
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), Remaining())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


Remarked = Callable[[int, str], None]


@contextmanager
def remark_bar(title: str, total: int) -> Iterator[Remarked]:
    """Progress of a known number of steps on standard error, with a remark beside it; it gets (done, remark).

    Where standard error is no terminal, a line for every tenth.

    Raises:
        MissingExtraError: `rich` is not installed.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining
    except ImportError as error:
        raise MissingExtraError("rich", "report", "A progress bar") from error
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        tenths = {max(1, total * i // 10) for i in range(1, 11)}
        yield lambda done, remark: console.print(f"{title}: {done}/{total} {remark}") if done in tenths else None
        return
    pace = TextColumn("{task.fields[pace]}")
    remarks = TextColumn("{task.fields[remark]}")
    title_column, clocks = TextColumn("{task.description}"), (TimeElapsedColumn(), Remaining())
    columns = (title_column, BarColumn(), MofNCompleteColumn(), *clocks, pace, remarks)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, remark="", pace="")
        shown = next(t for t in progress.tasks if t.id == task)

        def advance(done: int, remark: str) -> None:
            speed = shown.speed
            pace = "" if not speed else f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"
            progress.update(task, completed=done, remark=remark, pace=pace)

        yield advance
