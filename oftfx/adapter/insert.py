"""Carry out a plan: put the rotations of one adapter into a model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch.nn as nn

from oftfx.adapter.store import Adapter, find_store, store_of
from oftfx.errors import AdapterError, RuleError, warn
from oftfx.model.compressed import keep_compressed
from oftfx.model.huggingface import allow_training, note_zeros
from oftfx.model.index import ModelIndex
from oftfx.model.names import child_name
from oftfx.passes.insert_rotations import InsertRotations
from oftfx.passes.protocol import PassManager, PassResult
from oftfx.placement.base import SiteRotations
from oftfx.placement.rows import check_no_rows
from oftfx.planning.plans import Plan
from oftfx.planning.program import Program


def insert(model: nn.Module, program: Program, adapter: str, *, trainable: bool) -> Adapter:
    """Insert a planned adapter into ``model``, inactive, and enter it in the model's store.

    ``trainable``: whether its parameters require gradients when it acts.
    """
    check_no_rows(model, "adding an adapter")
    index = ModelIndex(model)
    check_insertable(index, program.planned)
    first = find_store(model) is None
    if first:
        keep_compressed(model)
    result = PassManager([InsertRotations(adapter, activate=False)]).run(program.with_(index=index))
    store = store_of(model)
    if first:
        store.freeze_base(result.program.index)
        allow_training(model)
        note_zeros(model)
    return store.add(result.program.index, Adapter(adapter, _noted(program.planned, result), trainable))


def check_insertable(index: ModelIndex, plan: Plan) -> None:
    """Find what would make an insertion fail half way.

    Raises:
        AdapterError: a layer has a child called ``oft`` of its own, or a parameter that is to train is not a float.
        RuleError: a name the model does not have, or one named twice.
    """
    names = [e.fqn for e in plan]
    if twice := next((n for n, c in Counter(names).items() if c > 1), None):
        raise RuleError(f"the plan rotates {twice} twice")
    for entry in plan:
        child_at = child_name(entry.site.parameter)
        child = index.modules[entry.site.module]._modules.get(child_at)
        if child is not None and not isinstance(child, SiteRotations):
            raise AdapterError(
                f"{entry.fqn} has a child {child_at!r} of its own ({type(child).__name__}), where a rotation would go"
            )
    for name in plan.train_buffers:
        if name not in index.buffers:
            raise RuleError(f"the plan has {name}, which {type(index.model).__name__} does not have as a buffer")
    for name in (*plan.train, *plan.brought):
        if name not in index.parameters:
            raise RuleError(f"the plan trains {name}, which {type(index.model).__name__} does not have as a parameter")
        if not index.parameters[name].is_floating_point():
            raise AdapterError(
                f"{name} is stored as {index.parameters[name].dtype} and cannot train; name float modules only"
            )


def _noted(plan: Plan, result: PassResult) -> Plan:
    """The plan with what the layers' formats had to undo, which the user also gets as one warning."""
    notices = {c.site: c.reason for c in result.changes if c.reason}
    for text, sites in Counter(notices.values()).items():
        where = next(s for s, t in notices.items() if t == text)
        warn(f"{sites} layers, e.g. {where}: {text}")
    entries = tuple(replace(e, notes=(*e.notes, notices[e.fqn])) if e.fqn in notices else e for e in plan)
    return replace(plan, entries=entries)
