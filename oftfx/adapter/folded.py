"""A folded model as a directory with everything that brings it back."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn as nn

from oftfx.adapter.as_compressed import Compressed
from oftfx.adapter.as_gptq_awq import AsAwq, AsGptq
from oftfx.adapter.as_transforms import WithTransforms
from oftfx.adapter.checkpoints import Checkpoint, Facts, Hqq, Plain, Transformers
from oftfx.adapter.fixed_rotations import FILE as ROTATIONS
from oftfx.adapter.fixed_rotations import load_rotations, multiply_right, save_rotations
from oftfx.adapter.fold_note import check_note
from oftfx.adapter.four_bit_state import FourBitState
from oftfx.adapter.quanto_state import QuantoState
from oftfx.adapter.servers import check_server
from oftfx.adapter.with_code import WithCode
from oftfx.errors import AdapterFileError, FoldError
from oftfx.files import finish_landing, is_name, landing, of_version, remains, write
from oftfx.folding.checkpoint import checkpoint_digest
from oftfx.folding.note import fold_notes, note_again
from oftfx.folding.report import FoldReport
from oftfx.model.compressed import keep_compressed
from oftfx.placement.find import rotated_sites
from oftfx.typed_json import read_object
from oftfx.version import __version__

NOTE = "oftfx_fold.json"
_VERSION = 1
_CONFIG = "config.json"
_COMPANIONS = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
               "*.model", "preprocessor_config.json", "processor_config.json")  # fmt: skip
_WAYS: tuple[type[Checkpoint], ...] = (FourBitState, QuantoState, Hqq, Transformers, Plain)
_AS: dict[str, type[Checkpoint]] = {"compressed-tensors": Compressed, "gptq": AsGptq, "awq": AsAwq}
_ROTATING: dict[str, type[Checkpoint]] = {"code": WithCode, "transforms": WithTransforms}
"""How a server is given rotations that stay, beside the integers of compressed-tensors."""


def save_folded(
    model: nn.Module,
    report: FoldReport,
    directory: str | Path,
    *,
    save_as: str | None = None,
    server: str | None = None,
    rotations: str | None = None,
    beside: Sequence[Path] = (),
) -> Path:
    """See `oftfx.FoldResult.save`; files ``beside`` it are copied and land with it."""
    directory = Path(directory)
    stays = any(p.fixed for _, p in rotated_sites(model))
    way = _way(model, save_as, server, rotations, stays)
    if server is not None:
        check_server(model, server, save_as)
    stale = own_files(directory)
    head = NOTE if isinstance(way, Plain) else _CONFIG
    with landing(directory, head, FoldError, stale=stale) as made:
        try:
            facts = way.write(model, report, made)
        except (ValueError, NotImplementedError) as error:
            raise FoldError(f"{directory}: {way.name} cannot write this {type(model).__name__}: {error}") from error
        for file in beside:
            if not (made / file.name).exists():
                shutil.copyfile(file, made / file.name)
        if stays and not way.rotations_inside:
            save_rotations(model, made)
        write(made / NOTE, note_of(made, report, way.name, facts, fold_notes(model)))
    return directory


def _way(model: nn.Module, save_as: str | None, server: str | None, rotations: str | None, stays: bool) -> Checkpoint:
    """How the weights are written."""
    if save_as not in (None, *_AS):
        raise FoldError(f"save_as={save_as!r}; a fold is saved as it is (None), or as one of {', '.join(_AS)}")
    if rotations not in (None, *_ROTATING):
        raise FoldError(f"rotations={rotations!r}; known: {', '.join(_ROTATING)}")
    for_server = stays and server is not None and save_as == "compressed-tensors"
    if rotations is not None and not for_server:
        raise FoldError(
            f"rotations={rotations!r} is for a fold with quantized='keep' that is saved with "
            "save_as='compressed-tensors' and server='vllm'"
        )
    if for_server:
        return _ROTATING[rotations or "code"]()
    if save_as is None:
        return next(c for c in _WAYS if c.takes(model))()
    return Compressed(server is not None) if save_as == "compressed-tensors" else _AS[save_as]()


def note_of(
    made: Path, report: FoldReport, way: str, facts: Facts, folds: Sequence[Mapping[str, Any]], **more: Any
) -> bytes:
    """The note for the files that are in a directory.

    Args:
        made: where all of them are but the note.
        report: of the fold.
        way: which `Checkpoint` reads them.
        facts: what it has to know.
        folds: see `fold_notes`.
        **more: further entries, which no reader needs.
    """
    rotations = made / ROTATIONS
    note = {
        "oftfx_fold": _VERSION,
        "oftfx": __version__,
        "way": way,
        "facts": facts,
        "files": sorted([*(p.name for p in made.iterdir()), NOTE]),
        "checkpoint": checkpoint_digest(made),
        "rotations": file_sum(rotations) if rotations.exists() else None,
        "folds": [*folds],
        **more,
        "report": json.loads(report.to_json()),
    }
    return (json.dumps(note, indent=1) + "\n").encode()


def load_folded(directory: str | Path, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """Read what `FoldResult.save` wrote: the model that the fold gave, rotations that stay included.

    Args:
        directory: the directory.
        model: for a plain ``nn.Module`` one of the same making, which is filled in place. A transformers model is made
            here; one whose class transformers does not have is given as its own ``from_pretrained`` returned it.
        **options: of ``from_pretrained`` (``device_map``, ``dtype``), or of hqq's ``from_quantized``.

    Returns:
        The model, in eval mode where it was made here.

    Raises:
        AdapterFileError: the directory is not complete, not of one save, of another version, or not of this model.

    Examples:
        >>> import oftfx, torch
        >>> base, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(5, 6)
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> result = oftfx.fold(model)
        >>> loaded = oftfx.load_folded(result.save("folded"), torch.nn.Sequential(torch.nn.Linear(6, 4)))
        >>> torch.equal(loaded(x), result.model(x))
        True
    """
    directory = Path(directory)
    note = read_note(directory)
    way = next((c for c in _WAYS if c.name == note["way"]), None)
    if way is None:
        raise AdapterFileError(
            f"{directory / NOTE}: way is {note['way']!r}, expected one of {', '.join(c.name for c in _WAYS)}"
        )
    try:
        loaded = way().read(directory, note["facts"], model, options)
    except KeyError as error:
        raise AdapterFileError(f"{directory / NOTE}: its facts do not have {error}") from None
    modules = dict(loaded.named_modules())
    if (odd := next((f["module"] for f in note["folds"] if f["module"] not in modules), None)) is not None:
        raise AdapterFileError(f"{directory / NOTE} names a fold of {odd!r}, which this model does not have")
    keep_compressed(loaded)
    multiply_right({s["fqn"]: modules[s["fqn"]] for s in note["report"]["sites"] if s["fqn"] in modules})
    if note["rotations"] is not None:
        load_rotations(loaded, directory)
    note_again(loaded, note["folds"])
    return loaded


def read_note(directory: Path) -> dict[str, Any]:
    """The note, once all that it names is there and is what was saved."""
    finish_landing(directory, _CONFIG, NOTE)
    if advice := remains(directory, _CONFIG, NOTE):
        raise AdapterFileError(f"{directory}: {advice}")
    if not (directory / NOTE).is_file():
        there = "; load it with from_pretrained and oftfx.load_rotations" if (directory / ROTATIONS).is_file() else ""
        raise AdapterFileError(f"there is no {NOTE} in {str(directory)!r}; FoldResult.save writes it{there}")
    note = read_object(directory / NOTE)
    if "oftfx_fold" not in note:
        raise AdapterFileError(f"{directory / NOTE} is damaged: it does not say its version")
    if (version := note["oftfx_fold"]) != _VERSION:
        raise AdapterFileError(f"{directory / NOTE} has {of_version(version, _VERSION)}")
    try:
        check_note(note)
        if missing := [name for name in note["files"] if not (directory / name).is_file()]:
            raise AdapterFileError(
                f"{directory}: {missing[0]} is missing, which {NOTE} names; is the directory complete?"
            )
        same = checkpoint_digest(directory) == note["checkpoint"]
        wrong = "" if same else "the checkpoint"
        if note["rotations"] is not None and file_sum(directory / ROTATIONS) != note["rotations"]:
            wrong = ROTATIONS
    except AdapterFileError:
        raise
    except (OSError, ValueError, FoldError) as error:
        raise AdapterFileError(f"{directory / NOTE} is damaged: {error}") from None
    if wrong:
        raise AdapterFileError(
            f"{directory}: {wrong} is not what {NOTE} was written with: the files are of two saves. Take all from one, "
            "or save again"
        )
    return note


def own_files(directory: Path) -> list[str]:
    """What an earlier save of ours left there, to be replaced; what others left there must not be."""
    if (directory / NOTE).is_file():
        named = read_object(directory / NOTE).get("files")
        return [n for n in named if is_name(n)] if isinstance(named, list) else []
    if directory.is_dir() and ((directory / _CONFIG).exists() or checkpoint_digest(directory) is not None):
        raise FoldError(
            f"{directory} holds a checkpoint that FoldResult.save did not write, and only what it wrote itself is "
            "replaced; choose another directory, or remove it first"
        )
    return []


def companions(base: Path) -> list[Path]:
    """What belongs to a checkpoint besides its weights and configuration: its tokenizer or processor."""
    return sorted({file for pattern in _COMPANIONS for file in base.glob(pattern) if file.is_file()})


def file_sum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
