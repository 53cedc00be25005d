"""The adapter that a file of another tool stands for in a model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.contents import rotation_by_site
from oftfx.adapter.conventions.base import Foreign, Outgoing, Target, Turn
from oftfx.adapter.conventions.orthogonal import blocks_of_skew
from oftfx.adapter.conventions.source import Source
from oftfx.adapter.from_file import AdapterFiles, entry_of, with_kernel
from oftfx.adapter.packed import packed
from oftfx.adapter.peft_files import CONFIG_FILE, PLAN_FILE, WEIGHT_FILE
from oftfx.adapter.scales import SCALE_FILE, scale_tensors
from oftfx.adapter.store import AdapterStore
from oftfx.adapter.whole_tensors import check_whole, whole_in_config
from oftfx.errors import AdapterError, AdapterFileError, warn
from oftfx.files import landing, write, write_whole
from oftfx.formats.dense import DenseParameter
from oftfx.model.site import Site
from oftfx.planning.from_peft import configured_sites
from oftfx.planning.plans import Plan
from oftfx.planning.program import Program
from oftfx.rotation.module import whole
from oftfx.rotation.skew import skew_matrix


def read_foreign(
    convention: Foreign,
    source: Source,
    program: Program,
    store: AdapterStore | None,
    *,
    part: str | None,
    trainable: bool,
) -> tuple[Plan, AdapterFiles]:
    """The plan and the numbers, checked against the model; nothing in it changes.

    Raises:
        AdapterError: it does not fit the model.
        AdapterFileError: something in the file cannot be said here.
    """
    root = program.model
    sites = {s.fqn: s for s in program.sites}
    known = {s.module: program.index.modules[s.module] for s in program.sites}
    found = convention.read(source, Target(type(root).__name__, sites, known, part))
    if not found.turns:
        raise AdapterFileError(f"{source.path}: no rotation in it")
    expected = configured_sites(found.config, sites)
    if missing := sorted(expected - set(found.turns)):
        raise AdapterFileError(
            f"{source.path}: no rotation for {missing[0]}"
            + (f" and {len(missing) - 1} more sites" if len(missing) > 1 else "")
            + f", which {CONFIG_FILE} names; is the file complete?"
        )
    order = {fqn: index for index, fqn in enumerate(sites)}
    entries, skews, others = [], {}, dict(found.others)
    for fqn in sorted(found.turns, key=lambda f: order[f]):
        turn, site = found.turns[fqn], sites[fqn]
        if turn.side == "output":
            _check_float(site, known[site.module], f"convention {convention.name!r} rotates what a layer gives out")
        if turn.has_own_weight:
            others[site.weight_name] = _own_weight(turn, site, known[site.module], store)
        entries.append(
            entry_of(site.of_outputs() if turn.side == "output" else site, turn.spec, turn.skew, source.path)
        )
        skews[fqn] = turn.skew
    besides = whole_in_config(found.config, others, program.index, store)
    check_whole(besides, others, program.index, source.path)
    for remark in found.remarks:
        warn(remark)
    if own := [f for f, t in found.turns.items() if t.has_own_weight]:
        warn(
            f"{len(own)} layers, e.g. {own[0]}: the file has more than rotations (scales of rows, or reflections), "
            "so the adapter keeps a copy of their weights with that in it"
        )
    if trainable and found.unbounded:
        warn(f"{source.path}: {found.unbounded}; training from here on goes without it")
    plan = Plan(
        type(root).__name__,
        tuple(with_kernel(e, root) for e in entries),
        train=besides.train,
        train_modules=besides.modules,
        train_bias=besides.bias,
        train_buffers=besides.buffers,
        brought=besides.brought,
    )
    return plan, AdapterFiles(source.directory, skews, others, source.notes)


def _check_float(site: Site, module: nn.Module, why: str) -> None:
    if site.kind == "embedding" or site.format != "dense" or not DenseParameter("weight", site.layout).matches(module):
        raise AdapterError(
            f"{site.fqn}: {why}, so its weight has to be plain floats, and this {site.module_class} stores "
            f"{site.format}. Load the float model, fold the adapter into that, and quantize the result (oftfx.quantize)"
        )
    if site.tied:
        raise AdapterError(
            f"{site.fqn}: {why}, and its weight is also {site.tied[0]}, which would change with it. Untie them first "
            "(a copy of the Parameter for each)"
        )


@torch.no_grad()
def _own_weight(turn: Turn, site: Site, module: nn.Module, store: AdapterStore | None) -> Tensor:
    """The weight that the rotation acts on, with the scales and signs of a file in it; computed in float64."""
    _check_float(site, module, "the file has scales of rows or reflections for it")
    weight = (store.originals if store else {}).get(site.weight_name, module.weight)
    assert isinstance(weight, Tensor)
    matrix = site.layout.matrix(weight.detach()).double()
    if turn.side == "input":
        matrix = matrix if turn.signs is None else matrix * turn.signs.to(matrix.device)
        matrix = matrix if turn.scale is None else matrix * turn.scale.to(matrix.device)[:, None]
    else:
        matrix = matrix if turn.signs is None else matrix * turn.signs.to(matrix.device)[:, None]
        if turn.scale is not None:  # R s R^T W, of which the rotation R^T makes s R^T W
            size = turn.spec.asked
            r = blocks_of_skew(skew_matrix(turn.skew.double(), size)).to(matrix.device)
            rows = torch.bmm(r.transpose(1, 2), matrix.unflatten(0, (-1, size)))
            matrix = torch.bmm(r, rows * turn.scale.to(matrix.device).view(-1, size, 1)).flatten(0, 1)
    return site.layout.restore(matrix, tuple(weight.shape)).to(weight.dtype).contiguous()


def write_foreign(
    convention: Foreign, root: nn.Module, store: AdapterStore, adapter: str, path: Path, part: str | None
) -> Path:
    """Write an adapter as another tool does; all of it lands, or nothing.

    Raises:
        AdapterError: the convention cannot say it, or the path is of the other kind.
        AdapterFileError: the files cannot be written.
    """
    is_file = path.suffix == ".safetensors"
    if is_file == convention.is_directory:
        wanted = "a directory" if convention.is_directory else "one file; give it a name that ends with .safetensors"
        raise AdapterError(f"{path}: convention {convention.name!r} is {wanted}")
    if scales := scale_tensors(root, adapter):
        raise AdapterError(
            f"adapter {adapter!r} has scales that were trained for a fold, e.g. {next(iter(scales))}, and convention "
            f"{convention.name!r} has no place for them. Write convention='oftfx' or 'peft', or fold it"
        )
    if part is not None and convention.is_directory:
        raise AdapterError(f"part={part!r}: files of convention {convention.name!r} are of one model")
    plan, own = store.adapters[adapter].plan, store.trained[adapter]
    names = {e.fqn: e.site.weight_name for e in plan if e.site.weight_name in plan.brought}
    weights = {fqn: (whole(own[n]).detach(), whole(store.originals[n]).detach()) for fqn, n in names.items()}
    written = convention.write(Outgoing(root, plan, rotation_by_site(root, store, adapter), weights, part))
    data = packed(dict(written.tensors), {"format": "pt", **written.notes})
    if is_file:
        write_whole(path, data, AdapterFileError)
        return path
    with landing(path, CONFIG_FILE, AdapterFileError, stale=[PLAN_FILE, SCALE_FILE]) as made:
        write(made / CONFIG_FILE, json.dumps(written.config, indent=2, sort_keys=True).encode())
        write(made / WEIGHT_FILE, data)
    return path
