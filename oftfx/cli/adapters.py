"""The commands on adapters: ``oftfx convert``, ``oftfx merge``, ``oftfx diff`` and ``oftfx to-lora``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from oftfx.cli import show
from oftfx.cli.options import (
    Adapter,
    Base,
    Convention,
    Force,
    Json,
    Part,
    Quiet,
    Sequence,
    Text,
    Threads,
    Tokens,
    use_threads,
)

_Out = Annotated[Path, typer.Argument(help="Directory, or file, for the result.", show_default=False)]


def convert(
    base: Base,
    adapter: Adapter,
    out: _Out,
    to: Annotated[str, typer.Option(help="What to write: peft, oftfx, lycoris, kohya, oft_v2, ...")] = "peft",
    convention: Convention = None,
    part: Part = None,
    rules: Annotated[
        Path | None,
        typer.Option(help="Of a Trainer checkpoint: the rules it was trained by, .toml or .json.", show_default=False),
    ] = None,
    force: Force = False,
) -> None:
    """Rewrite an adapter in the files of another tool; also a Trainer checkpoint, and adapters of old PEFT.

    The model tells what names in the file mean. What cannot be said in the other convention is refused.
    """
    from oftfx.adapter.conventions.registry import adapter_convention
    from oftfx.adapter.load import load_adapter
    from oftfx.adapter.save import save_adapter
    from oftfx.opened import open_model
    from oftfx.surgery import transform

    show.check_new(out, force=force)
    found = convention or adapter_convention(adapter)
    model: Any = open_model(base)
    if rules is not None:
        transform(model, rules, inplace=True)
    load_adapter(model, adapter, convention=convention, part=part)
    show.result(f"{save_adapter(model, out, convention=to)}: {to}, made of {found}")


def merge(
    base: Base,
    out: _Out,
    adapter: Annotated[
        list[str],
        typer.Option("--adapter", "-a", help="DIRECTORY, or DIRECTORY=WEIGHT; may be repeated.", show_default=False),
    ],
    bound: Annotated[float, typer.Option(help="How far an adapter may be from a rotation.")] = 0.01,
    force: Force = False,
    json: Json = False,
) -> None:
    """Blend adapters into one, on the manifold of rotations. Of one: its strength, -a news=0.5 turns half as far.

    Weights add up angles, log R = sum w log R_i; two adapters with weight 1 do both.
    """
    from oftfx.adapter.load import load_adapter
    from oftfx.adapter.save import save_adapter
    from oftfx.blending.blend import blend
    from oftfx.errors import AdapterError, AdapterFileError
    from oftfx.opened import open_model

    show.check_new(out, force=force)
    model, weights = open_model(base), dict[str, float]()
    for index, word in enumerate(adapter):
        path, weight = _weighted(word)
        name = f"a{index}"
        load_adapter(model, path, adapter=name)
        weights[name] = weight
    report = blend(model, weights, into="merged", bound=bound)
    try:
        save_adapter(model, out, adapter="merged")
    except AdapterFileError:  # which no other convention mends
        raise
    except AdapterError as error:
        show.say(f"saved in our own convention: {error}")
        save_adapter(model, out, adapter="merged", convention="oftfx")
    show.say(f"written: {out}")
    show.result(report.to_json() if json else report.table())


def diff(
    base: Base,
    first: Annotated[Path, typer.Argument(help="An adapter.", show_default=False)],
    second: Annotated[Path | None, typer.Argument(help="Another; without: the first's own angles.")] = None,
    json: Json = False,
) -> None:
    """How far two adapters are apart at each site, along the manifold of rotations; or how far one of them turns."""
    from oftfx.adapter.load import load_adapter
    from oftfx.blending.angles import rotation_angles
    from oftfx.blending.distance import adapter_distance
    from oftfx.opened import open_model

    model: Any = load_adapter(open_model(base), first, adapter="first")
    if second is not None:
        load_adapter(model, second, adapter="second")
    found: Any = rotation_angles(model, "first") if second is None else adapter_distance(model, "first", "second")
    show.result(found.to_json() if json else found.table())


def to_lora(
    base: Base,
    adapter: Adapter,
    out: _Out,
    rank: Annotated[int | None, typer.Option(min=1, help="Of every site.", show_default=False)] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead: the share of each update to keep; ranks differ.", show_default=False)
    ] = None,
    bound: Annotated[float, typer.Option(help="Largest share of an update that may be lost at a site.")] = 0.1,
    calibration: Text = None,
    tokens: Tokens = 2048,
    sequence: Sequence = 256,
    force: Force = False,
    threads: Threads = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write the nearest LoRA of an adapter, for servers that take nothing else; what is lost is said, and bounded."""
    from oftfx.adapter.load import load_adapter
    from oftfx.lora.convert import to_lora as nearest
    from oftfx.opened import open_model
    from oftfx.streaming.texts import calibration_from

    use_threads(threads)
    show.check_new(out, force=force)
    inputs = None if calibration is None else calibration_from(base, calibration, tokens, sequence)
    model = load_adapter(open_model(base), adapter)
    with show.waiting("approximate", quiet=quiet or json):
        report = nearest(model, out, rank=rank, energy=energy, calibration=inputs, bound=bound)
    show.say(f"written: {out}")
    show.result(report.to_json() if json else report.table())


def _weighted(word: str) -> tuple[str, float]:
    path, equals, weight = word.rpartition("=")
    if not equals:
        return word, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise show.OutputError(f"--adapter {word}: {weight!r} is no number; say DIRECTORY=WEIGHT") from None
