"""What the files of an adapter directory hold, and the plan that they stand for in a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter import peft_files
from oftfx.adapter.belonging import check_belongs
from oftfx.adapter.conventions.source import Source
from oftfx.adapter.peft_files import PLAN_FILE
from oftfx.adapter.read import read_config, read_json, read_plan, read_weights
from oftfx.adapter.store import AdapterStore
from oftfx.adapter.whole_tensors import check_whole, whole_in_config, whole_in_plan
from oftfx.errors import AdapterError, AdapterFileError
from oftfx.formats.exact import choose_kernel
from oftfx.model.site import Site
from oftfx.model.sites import choose_placement, fits
from oftfx.planning.from_peft import configured_sites, spec_from_config
from oftfx.planning.plans import Plan
from oftfx.planning.program import Program
from oftfx.planning.site_plan import SitePlan, TraceInfo
from oftfx.rotation.module import skew_rows
from oftfx.rotation.skew import skew_size
from oftfx.rotation.spec import OFT

# What a plan knows of a site besides its rotation.
_KNOWN = ("owner", "same_input", "placement", "local_input", "producer", "producer_reason", "tied_blocks")


@dataclass(frozen=True)
class AdapterFiles:
    """The numbers of an adapter directory, each checked for itself.

    Attributes:
        directory: where they are from.
        skews: by the path of their site.
        others: whole parameters and buffers by name.
        notes: metadata of the weights.
    """

    directory: Path
    skews: Mapping[str, Tensor]
    others: Mapping[str, Tensor]
    notes: Mapping[str, str]

    @classmethod
    def read(cls, directory: Path) -> AdapterFiles:
        """Read them.

        Raises:
            AdapterFileError: no such file, not readable, another kind of adapter, or numbers that are not finite.
        """
        where = directory / peft_files.WEIGHT_FILE
        tensors, notes = read_weights(where)
        skew_keys, parameter_keys = peft_files.read_keys(tensors, str(where))
        if wrong := next((k for k in skew_keys.values() if not tensors[k].is_floating_point()), None):
            raise AdapterFileError(f"{where}: {wrong} has dtype {tensors[wrong].dtype}, expected a float")
        skews = {fqn: tensors[k] for fqn, k in skew_keys.items()}
        return cls(directory, skews, {name: tensors[k] for name, k in parameter_keys.items()}, notes)

    @property
    def is_ours(self) -> bool:
        """Whether a plan is beside the tensors."""
        return (self.directory / PLAN_FILE).is_file()


def plan_of_file(program: Program, files: AdapterFiles, store: AdapterStore | None) -> Plan:
    """The plan that a file stands for, checked against the model; its numbers are not looked at.

    Args:
        program: of the model, which may be on the meta device.
        files: of the adapter.
        store: of the model, if it has adapters already.

    Raises:
        AdapterError: it does not fit the model.
        AdapterFileError: something is missing in it, or its files are of two saves.
    """
    root, directory, skews, others = program.model, files.directory, files.skews, files.others
    own = (directory / PLAN_FILE) if (directory / PLAN_FILE).is_file() else None
    saved = read_plan(own) if own else None
    config = read_json(own) if own else read_config(directory / peft_files.CONFIG_FILE)
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
                f"{where}: rotates {fqn}, which is no layer of {type(root).__name__}. {peft_files.nearest(fqn, sites)}"
            )
        spec = names.get(fqn) or spec_from_config(config)
        entries.append(entry_of(sites[fqn], spec, skew, where))
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
    check_belongs(files.notes, config, where, PLAN_FILE if saved else peft_files.CONFIG_FILE)
    return Plan(
        type(root).__name__,
        tuple(with_kernel(e, root) for e in entries),
        trace=saved.trace if saved else TraceInfo(),
        train=besides.train,
        train_modules=besides.modules,
        train_bias=besides.bias,
        train_buffers=besides.buffers,
        brought=besides.brought,
    )


def check_sizes(source: Source, program: Program) -> None:
    """Look at the header before memory is taken: no tensor of an adapter is larger than a weight here, or its square.

    Raises:
        AdapterFileError: one is, or all together are.
    """
    sizes = [t.numel() for t in (*program.index.parameters.values(), *program.index.buffers.values())]
    sizes += [s.in_features**2 * max(1, s.experts) for s in program.sites]
    known = {s.weight_name for s in program.sites}  # of other weights, a plan says which axis is rotated
    sizes += [max(p.shape) ** 2 for n, p in program.index.parameters.items() if n not in known and p.dim() > 1]
    limit, all_of_it = max(sizes, default=0), sum(math.prod(h.shape) for h in source.heads.values())
    if large := next((k for k, h in source.heads.items() if math.prod(h.shape) > limit), None):
        raise AdapterFileError(
            f"{source.named(large)} has shape {source.heads[large].shape}, more numbers than anything in "
            f"{type(program.model).__name__} could need. Is it an adapter of another model?"
        )
    if all_of_it > sum(sizes):
        raise AdapterFileError(
            f"{source.path} has {all_of_it:,} numbers, more than {type(program.model).__name__} and all rotations in "
            "front of its layers could have. Is it an adapter of another model?"
        )


def with_kernel(entry: SitePlan, root: nn.Module) -> SitePlan:
    """The entry with the way in which the layer that is here multiplies."""
    if not entry.site.is_layer:
        return entry
    kernel, note = choose_kernel(root.get_submodule(entry.site.module), entry.spec.kernel)
    return replace(entry, kernel=kernel, notes=(*entry.notes, note) if note else entry.notes)


def _as_saved(entry: SitePlan, saved: SitePlan, skew: Tensor, where: Path) -> SitePlan:
    """The entry with all that the plan beside the file knows of its site."""
    entry = replace(entry, **{name: getattr(saved, name) for name in _KNOWN})
    if len(entry.tied_blocks) not in (0, entry.blocks) or not agrees(entry, skew):
        raise AdapterFileError(
            f"{where}: {entry.fqn}: blocks that share their parameters in {PLAN_FILE} have different numbers"
        )
    return entry


def entry_of(site: Site, spec: OFT, skew: Tensor, where: Path) -> SitePlan:
    """The entry of a site by the shape of its skew.

    Raises:
        AdapterError: it does not fit the site.
    """
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


def agrees(entry: SitePlan, skew: Tensor) -> bool:
    """Whether blocks that share their parameters have the same numbers."""
    tied = entry.tied_blocks
    return entry.spec.block_share or all(torch.equal(skew[i], skew[tied.index(row)]) for i, row in enumerate(tied))
