"""Read adapter directories: checked whole before anything in the model changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.base_sketch import check_base
from oftfx.adapter.contents import rotation_by_site
from oftfx.adapter.conventions.base import Convention, Foreign
from oftfx.adapter.conventions.checkpoint import Checkpoint, fill, tensors_of
from oftfx.adapter.conventions.peft import check_native
from oftfx.adapter.conventions.registry import convention_named, convention_of
from oftfx.adapter.conventions.source import Source
from oftfx.adapter.foreign import read_foreign
from oftfx.adapter.from_file import AdapterFiles, agrees, check_sizes, plan_of_file
from oftfx.adapter.insert import insert
from oftfx.adapter.store import AdapterStore, check_name, check_no_part, find_store, store_of, unwrapped
from oftfx.errors import AdapterError, warn
from oftfx.model.given import check_given, check_own
from oftfx.passes.find_producers import FindProducers
from oftfx.passes.protocol import PassManager
from oftfx.passes.share_inputs import ShareInputs
from oftfx.placement.find import rotated_sites
from oftfx.placement.torch_private import forget_compiled
from oftfx.planning.plans import Plan
from oftfx.planning.program import Program
from oftfx.trace.inputs import names_inputs
from oftfx.trace.record import record_best

M = TypeVar("M", bound=nn.Module)

# What decides the meaning of a skew; an adapter in the model and a file have to agree in it.
_MEANING = ("parameterization", "terms", "block_share", "coft_eps")


def load_adapter(
    model: M,
    path: str | Path,
    *,
    adapter: str = "default",
    trainable: bool = False,
    convention: str | None = None,
    part: str | None = None,
) -> M:
    """Read an adapter that `save_adapter`, PEFT or another tool wrote, into ``model``, in place.

    A model that was never transformed gets the rotations the file names. Where it has an adapter of that name already,
    the values go into it, and its sites and settings have to be the file's. A model without an active adapter uses the
    new one at once. As in `oftfx.transform`, the program of a model that names inputs itself is recorded for a new
    adapter of PEFT's, so that layers that read the same tensor rotate in one product; our own says it itself.

    Args:
        model: the base model, or a transformed one.
        path: a directory, or one safetensors file; or a checkpoint of a model with rotations (a Trainer's, say), whose
            numbers go into the adapter that ``model`` has been given by the same rules.
        adapter: name in the model.
        trainable: whether its parameters require gradients when it acts; an adapter that exists keeps its own.
        convention: who wrote it and what it means; None to tell from the file. `oftfx.adapter_convention` has the
            names.
        part: where one file holds adapters of several models, the prefix of this model's keys, ``"lora_te1"`` say.

    Returns:
        ``model``.

    Raises:
        AdapterFileError: no such file, not readable, another kind of adapter, one whose convention is not clear, or
            numbers that are not finite.
        AdapterError: it does not fit the model; raised before anything changes.

    Examples:
        >>> import oftfx, torch
        >>> base, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(5, 6)
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> loaded = oftfx.load_adapter(base, oftfx.save_adapter(model, "news"))
        >>> loaded is base, torch.equal(loaded(x), model(x))
        (True, True)
    """
    check_name(adapter)
    check_given(model)
    check_own(unwrapped(model))
    source = Source.open(path)
    meaning = convention_of(source) if convention is None else convention_named(convention)
    check_no_part(model)
    store = find_store(model)
    root = unwrapped(model)
    if isinstance(meaning, Checkpoint):
        found = tensors_of(source, root, store, adapter)
        _check_no_codes(root, adapter)
        fill(found)
        return model
    program = Program.of(root)
    plan, files = read_adapter(source, meaning, program, store, part=part, trainable=trainable)
    skews, others = files.skews, files.others
    check_base(root, plan, files.notes, str(path))
    if store is not None and adapter in store.adapters:
        _check_same(store.adapters[adapter].plan, plan, skews, adapter)
        _check_no_codes(root, adapter)
        _warn_of_values(root, store, adapter, skews, path)
    else:
        program = program.with_(plan=plan)
        if names_inputs(root) and not files.is_ours:
            program = with_readers(program)
        insert(root, program, adapter, trainable=trainable)
    store = store_of(root)
    store.take_back(root)
    _fill(root, store, adapter, skews, others)
    new = not store.active
    store.activate(root, store.active or (adapter,))
    if new:
        store.follow(root, adapter)
        forget_compiled()
    return model


def read_adapter(
    source: Source,
    meaning: Convention,
    program: Program,
    store: AdapterStore | None,
    *,
    part: str | None,
    trainable: bool = False,
) -> tuple[Plan, AdapterFiles]:
    """The plan and the numbers of an adapter's files, checked against a model, which may be on the meta device.

    Raises:
        AdapterFileError: not readable, another kind of adapter, or numbers that are not finite.
        AdapterError: it does not fit the model.
    """
    if isinstance(meaning, Foreign):
        return read_foreign(meaning, source, program, store, part=part, trainable=trainable)
    check_native(source, meaning)
    check_sizes(source, program)
    files = AdapterFiles.read(source.directory)
    return plan_of_file(program, files, store), files


def _check_no_codes(root: nn.Module, adapter: str) -> None:
    """Refuse new values under codes that were made for the old ones."""
    for fqn, placement in rotated_sites(root):
        if any(adapter in names and not aware.turns for names, aware in placement.through.items()):
            raise AdapterError(
                f"adapter {adapter!r} is fold-aware: {fqn} computes with codes that were made for its present values. "
                "Switch that off first, oftfx.fold_aware(model, None), or load under another name"
            )


def with_readers(program: Program) -> Program:
    """The program with what a recording of the bare model tells of the sites: who reads the same, and what makes it."""
    recorded = program.with_(recording=record_best(program.model, bare=True))
    return PassManager([ShareInputs(), FindProducers()]).run(recorded).program


def _warn_of_values(
    root: nn.Module, store: AdapterStore, adapter: str, skews: Mapping[str, Tensor], path: str | Path
) -> None:
    """Say that values which were trained, or loaded, go; those of a new adapter are the identity, and nobody's."""
    for fqn, rotation in rotation_by_site(root, store, adapter).items():
        there = rotation.every_skew().detach()
        if bool(there.any()) and not torch.equal(there.cpu(), skews[fqn].to(there.dtype)):
            warn(
                f"adapter {adapter!r} had other values than {path} has (at {fqn}, say), which are replaced; load under "
                "another name, load_adapter(..., adapter=...), to have both"
            )
            return


def _check_same(here: Plan, file: Plan, skews: Mapping[str, Tensor], adapter: str) -> None:
    """The adapter in the model and the file have to mean the same; the message names the first difference."""
    mine, theirs = {e.fqn: e for e in here}, {e.fqn: e for e in file}
    if only := sorted(set(mine) ^ set(theirs)):
        side = "the model" if only[0] in mine else "the file"
        raise AdapterError(
            f"adapter {adapter!r}: {len(only)} sites are rotated on one side only, e.g. {only[0]} in {side}. Load it "
            "under another name"
        )
    for fqn, entry in mine.items():
        other = theirs[fqn]
        for what, a, b in [
            ("block_size", entry.block_size, other.block_size),
            *((k, getattr(entry.spec, k), getattr(other.spec, k)) for k in _MEANING),
        ]:
            if a != b:
                raise AdapterError(
                    f"adapter {adapter!r}: {fqn}: {what} is {a} in the model and {b} in the file. "
                    "Load it under another name"
                )
        if not agrees(entry, skews[fqn]):
            raise AdapterError(
                f"adapter {adapter!r}: {fqn}: blocks that share their parameters in the model have different numbers "
                "in the file. Load it under another name"
            )
        if entry.owner != fqn and not torch.equal(skews[fqn], skews[entry.owner]):
            raise AdapterError(
                f"adapter {adapter!r}: {fqn} shares the rotation of {entry.owner} in the model, but the file has "
                "different numbers for them. Load it under another name"
            )
    for what in ("train", "train_buffers", "brought"):
        if differing := sorted(set(getattr(here, what)) ^ set(getattr(file, what))):
            raise AdapterError(
                f"adapter {adapter!r}: what it has besides rotations is not the same in the model and in the file: "
                f"{', '.join(differing[:3])}. Load it under another name"
            )


@torch.no_grad()
def _fill(
    root: nn.Module,
    store: AdapterStore,
    adapter: str,
    skews: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
) -> None:
    for fqn, rotation in rotation_by_site(root, store, adapter).items():
        rotation.set_every_skew(skews[fqn])
    for name, tensor in others.items():
        if name in store.trained[adapter]:
            store.trained[adapter][name].copy_(tensor)
        elif name in store.buffers.own[adapter]:
            store.buffers.fill(adapter, name, tensor)
