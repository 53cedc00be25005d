"""The commands ``oftfx report`` and ``oftfx card``: what was measured, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oftfx.cli import show
from oftfx.cli.options import Force


def report(
    folds: Annotated[
        list[str],
        typer.Argument(help="A folded directory, or a report as JSON; several are compared. NAME=PATH names one."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The page: .html, .md, or a directory for figures.", show_default=False)
    ],
    force: Force = False,
) -> None:
    """A page of one fold, or of several side by side: HTML that needs no network, Markdown, or figures for papers."""
    from oftfx.adapter.folded import NOTE
    from oftfx.files import write_whole
    from oftfx.folding.compare import CompareReport
    from oftfx.folding.report import FoldReport

    show.check_new(out, force=force)
    reports = {}
    for word in folds:
        name, equals, place = word.partition("=")
        path = Path(place if equals else word)
        file = path / NOTE if path.is_dir() else path
        if not file.is_file():
            raise show.OutputError(f"there is no {file}; expected a folded directory, or what `oftfx fold --json` said")
        reports[name if equals else path.stem] = FoldReport.from_json(file.read_text(encoding="utf-8"))
    made = next(iter(reports.values())) if len(reports) == 1 else CompareReport(reports)
    if out.suffix == ".html":
        made.to_html(out)
    elif out.suffix == ".md":
        write_whole(out, made.to_markdown().encode(), show.OutputError)
    elif isinstance(made, FoldReport):
        made.save_figures(out)
    else:
        raise show.OutputError(f"{out}: a comparison is written as .html or .md")
    show.result(str(out))


def card(
    folded: Annotated[Path, typer.Argument(help="A folded directory.", show_default=False)],
    title: Annotated[
        str | None, typer.Option(help="Heading; the directory's name without.", show_default=False)
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="The base's name on the Hub.", show_default=False)] = None,
    license_name: Annotated[str | None, typer.Option("--license", help="apache-2.0, say.", show_default=False)] = None,
    language: Annotated[list[str] | None, typer.Option(help="A code; may be repeated.", show_default=False)] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="On the Hub; may be repeated.", show_default=False)] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A further tag; may be repeated.", show_default=False)] = None,
    write: Annotated[bool, typer.Option("--write", help="As README.md into the directory, not to the screen.")] = False,
    force: Force = False,
) -> None:
    """A model card for the Hub, with the figures that the fold has measured."""
    from oftfx.adapter.card import model_card
    from oftfx.files import write_whole

    place = folded / "README.md"
    if write:
        show.check_new(place, force=force)
    text = model_card(
        folded, title=title, base_model=base_model, license=license_name, language=language or (),
        datasets=dataset or (), tags=tag or (),
    )  # fmt: skip
    if write:
        write_whole(place, text.encode(), show.OutputError)
    show.result(str(place) if write else text)
