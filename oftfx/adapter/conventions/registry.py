"""Which conventions there are, and which one a file has."""

from __future__ import annotations

from pathlib import Path

from oftfx.adapter.conventions.base import Convention, Foreign
from oftfx.adapter.conventions.checkpoint import Checkpoint
from oftfx.adapter.conventions.diag_oft import COMFYUI, KOHYA, LYCORIS
from oftfx.adapter.conventions.diffusers import Diffusers
from oftfx.adapter.conventions.oft_v2 import OFTv2
from oftfx.adapter.conventions.peft import OURS, PEFT, PEFT_016, Native
from oftfx.adapter.conventions.peft_014 import PEFT014
from oftfx.adapter.conventions.peft_boft import PEFT_BOFT, SD_SCRIPTS_BOFT
from oftfx.adapter.conventions.peft_hra import HRA
from oftfx.adapter.conventions.source import Source
from oftfx.errors import AdapterError, AdapterFileError

CONVENTIONS: dict[str, Convention] = {
    c.name: c
    for c in (
        PEFT,
        OURS,
        PEFT_016,
        PEFT014(),
        PEFT_BOFT,
        HRA(),
        Diffusers(),
        OFTv2(),
        SD_SCRIPTS_BOFT,
        LYCORIS,
        KOHYA,
        COMFYUI,
        Checkpoint(),
    )
}


def adapter_convention(path: str | Path) -> str:
    """Which convention an adapter's files have, by the names, shapes and notes in their headers.

    Args:
        path: a directory, or one safetensors file.

    Returns:
        A name that `load_adapter` and `save_adapter` take: ``"peft"``, ``"oftfx"``, ``"peft-0.16"``, ``"peft-0.14"``,
        ``"peft-boft"``, ``"peft-hra"``, ``"diffusers"``, ``"oft_v2"``, ``"sd-scripts-boft"``, ``"lycoris"``,
        ``"kohya"``, ``"comfyui"``, or ``"checkpoint"``, which `load_adapter` alone takes.

    Raises:
        AdapterFileError: no such file, a pickled or damaged one, no adapter of rotations, or one that could be of
            several conventions; the message names them.

    Examples:
        >>> import oftfx, torch
        >>> model = oftfx.transform(torch.nn.Sequential(torch.nn.Linear(6, 4)), {"*": oftfx.OFT(3)})
        >>> oftfx.adapter_convention(oftfx.save_adapter(model, "news"))
        'peft'
        >>> oftfx.adapter_convention(oftfx.save_adapter(model, "news.safetensors", convention="oft_v2"))
        'oft_v2'
    """
    return convention_of(Source.open(path)).name


def convention_of(source: Source) -> Convention:
    """The convention of an opened file.

    Raises:
        AdapterFileError: none, or several.
    """
    found = [c for c in CONVENTIONS.values() if c.recognizes(source)]
    if len(found) == 1:
        return found[0]
    if found:
        choices = ", ".join(f"convention={c.name!r} ({c.made_by})" for c in found)
        raise AdapterFileError(
            f"{source.path}: its names and notes fit several conventions, in which the same numbers mean different "
            f"rotations, or it mixes several: {choices}. Say which: load_adapter(..., convention=...)"
        )
    some = next(iter(source.heads), None)
    raise AdapterFileError(
        f"{source.path}: no key is of an adapter of rotations; "
        + (f"the first is {some!r}. " if some else "it has none. ")
        + f"Known are {', '.join(CONVENTIONS)}"
    )


def convention_named(name: str) -> Convention:
    """A convention by its name.

    Raises:
        AdapterError: there is none; with the names.
    """
    if name not in CONVENTIONS:
        raise AdapterError(f"convention: got {name!r}, expected one of {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def written_names() -> list[str]:
    """The names that `save_adapter` takes."""
    return [
        n for n, c in CONVENTIONS.items() if (c.read_only == "" if isinstance(c, Foreign) else isinstance(c, Native))
    ]
