"""The command ``oftfx plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from oftfx.errors import MissingExtraError, OftfxError


def plan(
    model: Annotated[Path, typer.Argument(help="Directory with a transformers config.json.")],
    rules: Annotated[str, typer.Option(help="'all-linear' or a .toml file with [[rule]] tables.")] = "all-linear",
    block_size: Annotated[int | None, typer.Option(min=1, help="Block size for 'all-linear'.")] = None,
    full: Annotated[bool, typer.Option("--full", help="One row a site.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what a transform would do, from the model's config alone: no weights are loaded."""
    from oftfx.rotation.spec import OFT
    from oftfx.surgery import plan as plan_of

    asked: Any = {"all-linear": OFT(block_size)} if block_size and rules == "all-linear" else rules
    result = plan_of(_meta_model(model), asked)
    print(result.to_json() if json else result.table(full=full))  # noqa: T201


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
