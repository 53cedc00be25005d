"""Read adapter directories: checked whole before anything in the model changes."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter import peft_files
from oftfx.adapter.belonging import check_belongs
from oftfx.adapter.contents import rotation_by_site
from oftfx.adapter.insert import insert
from oftfx.adapter.read import read_config, read_plan, read_weights
from oftfx.adapter.save import PLAN_FILE
from oftfx.adapter.store import AdapterStore, check_name, check_no_part, find_store, store_of, unwrapped
from oftfx.adapter.whole_tensors import check_whole, whole_in_config, whole_in_plan
from oftfx.errors import AdapterError, AdapterFileError
from oftfx.formats.exact import choose_kernel
from oftfx.model.site import Site
from oftfx.model.sites import choose_placement, fits
from oftfx.passes.find_producers import FindProducers
from oftfx.passes.protocol import PassManager
from oftfx.passes.share_inputs import ShareInputs
from oftfx.placement.find import rotated_sites
from oftfx.placement.torch_private import forget_compiled
from oftfx.planning.from_peft import configured_sites, spec_from_config
from oftfx.planning.plans import Plan
from oftfx.planning.program import Program
from oftfx.planning.site_plan import SitePlan, TraceInfo
from oftfx.rotation.module import skew_rows
from oftfx.rotation.skew import skew_size
from oftfx.rotation.spec import OFT
from oftfx.trace.inputs import names_inputs
from oftfx.trace.record import record_best

# What decides the meaning of a skew; an adapter in the model and a file have to agree in it.
_MEANING = ("parameterization", "terms", "block_share", "coft_eps")

# What a plan knows of a site besides its rotation.
_KNOWN = ("owner", "same_input", "placement", "local_input", "producer", "producer_reason", "tied_blocks")


def load_adapter(model: nn.Module, path: str | Path, *, adapter: str = "default", trainable: bool = False) -> nn.Module:
    """Read an adapter directory that `save_adapter` or PEFT wrote, into ``model``, in place.

    A model that was never transformed gets the rotations the file names. Where it has an adapter of that name already,
    the values go into it, and its sites and settings have to be the file's. A model without an active adapter uses the
    new one at once. As in `oftfx.transform`, the program of a model that names inputs itself is recorded for a new
    adapter of PEFT's, so that layers that read the same tensor rotate in one product; the other layout says it itself.

    Args:
        model: the base model, or a transformed one.
        path: the directory.
        adapter: name in the model.
        trainable: whether its parameters require gradients when it acts; an adapter that exists keeps its own.

    Returns:
        ``model``.

    Raises:
        AdapterFileError: no such file, not readable, another kind of adapter, or numbers that are not finite.
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
    directory = Path(path)
    tensors, notes = read_weights(directory / peft_files.WEIGHT_FILE)
    skew_keys, parameter_keys = peft_files.read_keys(tensors, str(directory / peft_files.WEIGHT_FILE))
    skews = {fqn: tensors[k] for fqn, k in skew_keys.items()}
    if wrong := next((k for k in skew_keys.values() if not tensors[k].is_floating_point()), None):
        raise AdapterFileError(
            f"{directory / peft_files.WEIGHT_FILE}: {wrong} has dtype {tensors[wrong].dtype}, expected a float"
        )
    others = {name: tensors[k] for name, k in parameter_keys.items()}
    check_no_part(model)
    store = find_store(model)
    root = unwrapped(model)
    program = Program.of(root)
    plan = _plan_of_file(program, directory, skews, others, notes, store)
    if store is not None and adapter in store.adapters:
        _check_same(store.adapters[adapter].plan, plan, skews, adapter)
        _check_no_codes(root, adapter)
    else:
        program = program.with_(plan=plan)
        if names_inputs(root) and not (directory / PLAN_FILE).is_file():
            program = _recorded(program)
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


def _check_no_codes(root: nn.Module, adapter: str) -> None:
    """Refuse new values under codes that were made for the old ones."""
    for fqn, placement in rotated_sites(root):
        if any(adapter in names and not aware.turns for names, aware in placement.through.items()):
            raise AdapterError(
                f"adapter {adapter!r} is fold-aware: {fqn} computes with codes that were made for its present values. "
                "Switch that off first, oftfx.fold_aware(model, None), or load under another name"
            )


def _recorded(program: Program) -> Program:
    """The program with what a recording of the bare model tells of the sites: who reads the same, and what makes it."""
    recorded = program.with_(recording=record_best(program.model, bare=True))
    return PassManager([ShareInputs(), FindProducers()]).run(recorded).program


def _plan_of_file(
    program: Program,
    directory: Path,
    skews: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    notes: Mapping[str, str],
    store: AdapterStore | None,
) -> Plan:
    """The plan that a file stands for, checked against the model."""
    root = program.model
    own = (directory / PLAN_FILE) if (directory / PLAN_FILE).is_file() else None
    text = own.read_text(encoding="utf-8") if own else ""
    saved = read_plan(text, directory / PLAN_FILE) if own else None
    config = json.loads(text) if saved else read_config(directory / peft_files.CONFIG_FILE)
    sites = {s.fqn: s for s in program.sites}
    if saved:
        raw = [e.site for e in saved if not e.site.is_layer]
        sites |= {r.fqn: r for r in raw if (r.fqn not in sites or sites[r.fqn].is_layer) and fits(root, r)}
    names = {e.fqn: e.spec for e in saved} if saved else {}
    where = directory / peft_files.WEIGHT_FILE
    entries = []
    order = {fqn: index for index, fqn in enumerate(sites)}
    for fqn, skew in sorted(skews.items(), key=lambda item: order.get(item[0], -1)):
        if fqn not in sites:
            raise AdapterError(
                f"{where}: rotates {fqn}, which is no layer of {type(root).__name__}. {_nearest(fqn, sites)}"
            )
        spec = names.get(fqn) or spec_from_config(config)
        entries.append(_entry(sites[fqn], spec, skew, where))
    expected = {e.fqn for e in saved} if saved else configured_sites(config, sites)
    if missing := sorted(expected - set(skews)):
        raise AdapterFileError(
            f"{directory / peft_files.WEIGHT_FILE}: no rotation for {missing[0]}"
            + (f" and {len(missing) - 1} more sites" if len(missing) > 1 else "")
            + f", which {PLAN_FILE if saved else peft_files.CONFIG_FILE} names; is the file complete?"
        )
    if saved and (extra := sorted(set(skews) - expected)):
        raise AdapterFileError(
            f"{directory / peft_files.WEIGHT_FILE}: rotates {extra[0]}, which {PLAN_FILE} does not name"
        )
    if saved:
        entries = [_as_saved(e, saved[e.fqn], skews[e.fqn], where) for e in entries]
    besides = whole_in_plan(saved) if saved else whole_in_config(config, others, program.index, store)
    check_whole(besides, others, program.index, where)
    check_belongs(notes, config, where, PLAN_FILE if saved else peft_files.CONFIG_FILE)
    return Plan(
        type(root).__name__,
        tuple(_with_kernel(e, root) for e in entries),
        trace=saved.trace if saved else TraceInfo(),
        train=besides.train,
        train_modules=besides.modules,
        train_bias=besides.bias,
        train_buffers=besides.buffers,
        brought=besides.brought,
    )


def _with_kernel(entry: SitePlan, root: nn.Module) -> SitePlan:
    """The entry with the way in which the layer that is here multiplies."""
    if not entry.site.is_layer:
        return entry
    kernel, note = choose_kernel(root.get_submodule(entry.site.module), entry.spec.kernel)
    return replace(entry, kernel=kernel, notes=(*entry.notes, note) if note else entry.notes)


def _as_saved(entry: SitePlan, saved: SitePlan, skew: Tensor, where: Path) -> SitePlan:
    """The entry with all that the plan beside the file knows of its site."""
    entry = replace(entry, **{name: getattr(saved, name) for name in _KNOWN})
    if len(entry.tied_blocks) not in (0, entry.blocks) or not _agrees(entry, skew):
        raise AdapterFileError(
            f"{where}: {entry.fqn}: blocks that share their parameters in {PLAN_FILE} have different numbers"
        )
    return entry


def _entry(site: Site, spec: OFT, skew: Tensor, where: Path) -> SitePlan:
    size = _block_size(skew.shape[-1]) if skew.dim() == 2 else None
    rows = skew.shape[0] if skew.dim() == 2 else 0
    copies = site.experts if spec.experts == "each" and site.experts else 1
    blocks = site.in_features // size if size else 0
    if size is None or blocks * size != site.in_features or rows != skew_rows(spec, blocks, copies):
        asked = spec.block_size or spec.blocks
        raise AdapterError(
            f"{where}: {site.fqn}: skew of shape {tuple(skew.shape)} does not fit in_features {site.in_features}"
            + (f" with block_share={spec.block_share}" if size else f"; {skew.shape[-1]} is not b(b-1)/2 for any b")
            + f" (configuration: {asked}). Is it an adapter of another model?"
        )
    exact = spec if spec.geometry(site.in_features, site.fqn) == (blocks, size) else _resized(spec, size)
    placement = choose_placement(site, exact)
    return SitePlan(
        site, exact, blocks * copies, size, f"file {where.parent.name}", owner=site.fqn, placement=placement
    )


def _resized(spec: OFT, size: int) -> OFT:
    return replace(spec, block_size=size, blocks=None)


def _block_size(entries: int) -> int | None:
    size = (1 + math.isqrt(1 + 8 * entries)) // 2
    return size if skew_size(size) == entries else None


def _nearest(fqn: str, sites: Mapping[str, Site]) -> str:
    close = difflib.get_close_matches(fqn, sites, 2, 0.5)
    return f"Nearest: {', '.join(close)}" if close else f"It has {len(sites)} layers that can be rotated"


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
        if not _agrees(entry, skews[fqn]):
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


def _agrees(entry: SitePlan, skew: Tensor) -> bool:
    tied = entry.tied_blocks
    return entry.spec.block_share or all(torch.equal(skew[i], skew[tied.index(row)]) for i, row in enumerate(tied))


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
