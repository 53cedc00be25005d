"""What a command says: its result on standard output, everything else on standard error."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from oftfx.errors import OftfxError, OftfxWarning
from oftfx.files import check_writable, of_output, said
from oftfx.terminal import remark_bar

DONE, FAILED, WRONG_USE, DIFFERENT, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit statuses; `DIFFERENT`: the comparison that was asked for was made, and it did not come out well."""

console = Console(stderr=True, highlight=False, soft_wrap=True)


class OutputError(OftfxError, ValueError):
    """The place for a result is taken."""


def say(text: str) -> None:
    """A line for the user, beside the result."""
    console.print(text, markup=False)


def result(text: str) -> None:
    """What the command was started for."""
    typer.echo(text.rstrip("\n"))


def bars(*, quiet: bool) -> Callable[[str, int], Any]:
    """How long steps are shown: ``with bar(title, total) as advance: advance(done, remark)``."""
    if quiet:
        return lambda _title, _total: nullcontext(lambda _done, _remark: None)
    return remark_bar


@contextmanager
def counted(title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar for functions that call with (done, all), and know the whole only then."""
    if quiet:
        yield None
        return
    with steps(title) as advance:
        yield advance


@contextmanager
def steps(title: str) -> Iterator[Callable[[int, int], None]]:
    """The bar of `counted`; it opens at the first call."""
    opened: dict[str, Any] = {}

    def advance(done: int, total: int) -> None:
        if not opened:
            opened["bar"] = remark_bar(title, total)
            opened["advance"] = opened["bar"].__enter__()
        opened["advance"](done, "")

    try:
        yield advance
    finally:
        if opened:
            opened["bar"].__exit__(None, None, None)


def fail(error: BaseException) -> None:
    """An error as one message, with what was noted at it."""
    console.print(f"error: {error}", style="red", markup=False)
    for note in getattr(error, "__notes__", ()):
        console.print(note, markup=False)


@contextmanager
def phases(*, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar for each phase of functions that call with (phase, done, all)."""
    if quiet:
        yield None
        return
    with ExitStack() as stack:
        opened: dict[str, Callable[[int, int], None]] = {}

        def advance(phase: str, done: int, total: int) -> None:
            if phase not in opened:
                stack.close()
                opened[phase] = stack.enter_context(steps(phase))
            opened[phase](done, total)

        yield advance


@contextmanager
def waiting(title: str, *, quiet: bool) -> Iterator[None]:
    """For a step of unknown length: what is done, and for how long already."""
    if quiet or not console.is_terminal:
        if not quiet:
            say(f"{title} ...")
        yield
        return
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        progress.add_task(title, total=None)
        yield


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors are one message, not a traceback, and so is an interruption."""

    @functools.wraps(command)
    def guard(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt:  # which typer itself would call an abort
            say("interrupted; what was there is as it was, and where a run is resumed the same command goes on with it")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # whoever read the result has seen enough
            _end_of_output()
            raise typer.Exit(DONE) from None
        except OftfxError as error:
            fail(error)
            raise typer.Exit(FAILED) from None
        except OSError as error:
            refused(error)
            raise typer.Exit(FAILED) from None
        except MemoryError as error:
            fail(OftfxError(f"there is not enough memory: {error}"))
            raise typer.Exit(FAILED) from None

    return guard


def refused(error: OSError) -> None:
    """What the system refused, as one message."""
    if of_output(error):
        _end_of_output()
    fail(OftfxError(said(error)))


def _end_of_output() -> None:
    """Nothing more goes to standard output, where Python would fail once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_warnings() -> None:
    """Our own warnings as a line; not those of packages, with which nobody here can do anything."""
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it looks for an optional package, and says so

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, OftfxWarning):
            console.print(f"warning: {message}", style="yellow", markup=False)

    warnings.showwarning = show  # type: ignore[assignment]
    warnings.simplefilter("default", OftfxWarning)


def check_new(path: Path, *, force: bool) -> None:
    """Refuse to write over what is there, or where nothing can be written; before any work.

    Raises:
        OutputError: a file, or a directory that is not empty, is there, and it was not said to replace it; or the place
            cannot be written to.
    """
    taken = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if taken and not force:
        raise OutputError(f"{path} is there already; choose another place, or replace it: --force")
    check_writable(path, OutputError)


def check_page(html: Path | None, *, force: bool) -> None:
    """The same of a page, before the work whose report it is to have."""
    if html is not None:
        check_new(html, force=force)


def end(report: Any, text: str, html: Path | None) -> None:
    """Say the result, then write the page, if one was asked for: where that cannot be, the result is not lost."""
    result(text)
    if html is not None:
        report.to_html(html)
        say(f"written: {html}")
