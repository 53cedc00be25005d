"""The command ``oftfx plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from oftfx.cli import show
from oftfx.cli.options import Base, Force, Html, Json


def plan(
    model: Base,
    target: Annotated[str, typer.Option(help="Layers: names as in PEFT, q_proj,v_proj; or globs.")] = "all-linear",
    rules: Annotated[
        Path | None,
        typer.Option(help="Instead: a .toml file of rules, or a PEFT adapter_config.json.", show_default=False),
    ] = None,
    block_size: Annotated[int | None, typer.Option(min=1, help="Block size, with --target; 32 by default.")] = None,
    share_input: Annotated[
        bool, typer.Option("--share-input", help="One rotation for layers that read the same.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="One row a site.")] = False,
    html: Html = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Show what would be rotated, what not, and why; of a quantized model in its formats. No weights are loaded."""
    from oftfx.opened import open_bare
    from oftfx.surgery import plan as plan_of

    show.check_page(html, force=force)
    made = plan_of(open_bare(model), asked_rules(target, rules, block_size, share_input))
    show.end(made, made.to_json() if json else made.table(full=full), html)


def asked_rules(target: str, rules: Path | None, block_size: int | None, share_input: bool) -> Any:
    """What `oftfx.plan` takes, of the options that say it.

    Raises:
        OutputError: two of them do not go together.
    """
    from oftfx.planning.read_rules import names_of
    from oftfx.rotation.spec import OFT

    if rules is None:
        return {name: OFT(block_size, share_input=share_input) for name in names_of(target)}
    if target != "all-linear" or block_size is not None or share_input:
        raise show.OutputError("--rules says the layers and their rotations itself; leave the other options out")
    return rules
