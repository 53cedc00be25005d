"""Plan a model, put rotations into it, add further adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeVar, overload

import torch.nn as nn

from oftfx.adapter.before_fold import own_copy
from oftfx.adapter.insert import insert
from oftfx.adapter.store import check_name, check_no_part, find_store, store_of, transformed_part, unwrapped
from oftfx.adapter.switch import switchable
from oftfx.errors import AdapterError, RuleError
from oftfx.formats.exact import choose_kernel
from oftfx.model.given import check_given, check_own
from oftfx.model.sites import choose_placement, fits
from oftfx.model.structure import structural_copy
from oftfx.passes.find_functional import FindFunctional
from oftfx.passes.find_producers import FindProducers
from oftfx.passes.match_rules import MatchRules
from oftfx.passes.measure_coverage import MeasureCoverage
from oftfx.passes.protocol import PassManager, PassResult
from oftfx.passes.share_inputs import ShareInputs
from oftfx.placement.torch_private import forget_compiled
from oftfx.planning.from_peft import check_storage
from oftfx.planning.plans import Plan
from oftfx.planning.program import Program
from oftfx.planning.read_rules import Rules, asked_for, trains
from oftfx.planning.rules import Rule
from oftfx.planning.unreachable import can_look_into, unreachable
from oftfx.trace.graph_module import ProgramGraph
from oftfx.trace.graphs import graph
from oftfx.trace.inputs import ExampleInputs, names_inputs
from oftfx.trace.record import record_best

M = TypeVar("M", bound=nn.Module)
TrainBias = Literal["none", "all", "oft"]


def plan(
    model: nn.Module,
    rules: Rules,
    *,
    example_inputs: ExampleInputs = None,
    train: Sequence[str] = (),
    train_bias: TrainBias = "none",
) -> Plan:
    """Say what `transform` would do; the model is not changed, and may live on the meta device.

    Args:
        model: any module.
        rules: see `oftfx.planning.read_rules.asked_for` and `read_rules`; first match wins.
        example_inputs: a dict of keyword arguments or a tuple, to record the program with; transformers models name
            their own. Without a recording the plan is made from the module tree, and says so.
        train: names or globs of further modules that train whole and are saved with the adapter.
        train_bias: biases that train: ``"none"``, ``"all"``, or ``"oft"`` for those of rotated layers.

    Raises:
        RuleError: a rule that cannot be understood, matches nothing or does not divide.

    Examples:
        >>> import oftfx, torch
        >>> with torch.device("meta"):
        ...     model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 4))
        >>> plan = oftfx.plan(model, {"*": oftfx.OFT(3)})
        >>> [(site.fqn, site.blocks, site.block_size) for site in plan]
        [('0', 2, 3), ('1', 3, 3)]
    """
    check_given(model)
    bare = find_store(model) is not None
    planned = _planned(model, rules, example_inputs, train, train_bias, trace=True, bare=bare).program.planned
    check_storage(rules, planned)
    return planned


@overload
def transform(
    model: M,
    rules: Rules | Plan,
    *,
    example_inputs: ExampleInputs = None,
    adapter: str = "default",
    train: Sequence[str] = (),
    train_bias: TrainBias = "none",
    inplace: bool = False,
    emit: Literal["modules"] = "modules",
) -> M: ...


@overload
def transform(
    model: nn.Module,
    rules: Rules | Plan,
    *,
    example_inputs: ExampleInputs = None,
    adapter: str = "default",
    train: Sequence[str] = (),
    train_bias: TrainBias = "none",
    inplace: bool = False,
    emit: Literal["graph"],
) -> ProgramGraph: ...


def transform(
    model: M,
    rules: Rules | Plan,
    *,
    example_inputs: ExampleInputs = None,
    adapter: str = "default",
    train: Sequence[str] = (),
    train_bias: TrainBias = "none",
    inplace: bool = False,
    emit: Literal["modules", "graph"] = "modules",
) -> M | ProgramGraph:
    """Put a trainable rotation in front of every matched layer and freeze everything else.

    ``y = x @ W^T`` becomes ``y = (x @ blockdiag(R(skew))) @ W^T``. The result has the class, the methods and the
    parameter names of ``model``; new parameters are called ``<site>.oft.<adapter>.skew``. With skew at zero its outputs
    equal the model's bit for bit.

    Args:
        model: any module.
        rules: see `plan`; or a `Plan`, which is carried out as it stands.
        example_inputs: see `plan`. With them, or where the model names inputs itself, the program is recorded, so that
            layers that read the same tensor rotate in one product, or share a rotation where a spec says so.
        adapter: name of the new adapter; it is the active one afterwards.
        train: see `plan`. These parameters are copied, so the input's stay as they are.
        train_bias: see `plan`.
        inplace: change ``model`` itself. Otherwise the result is a module tree of its own over the same tensors, with
            own values of what trains.
        emit: ``"modules"``, or ``"graph"`` for an executable, trainable ``fx.GraphModule`` with the rotations as nodes.

    Raises:
        RuleError: see `plan`; raised before anything changes.
        AdapterError: the name is taken or cannot be an attribute name.
        TraceError: ``emit="graph"`` and the program cannot be recorded.

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.ReLU(), torch.nn.Linear(9, 4))
        >>> model = oftfx.transform(base, {"0": oftfx.OFT(3)})
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.oft.default.skew']
        >>> x = torch.randn(5, 6)
        >>> torch.equal(model(x), base(x))
        True
    """
    check_name(adapter)
    existing = find_store(model)
    if existing is not None and adapter in existing.adapters:
        raise AdapterError(f"the model already has an adapter {adapter!r}; it has {', '.join(existing.adapters)}")
    if emit not in ("modules", "graph"):
        raise RuleError(f"emit: got {emit!r}, expected 'modules' or 'graph'")
    if unwrapped(model) is not model:
        raise AdapterError(f"{type(model).__name__} wraps the model; transform the model itself, then wrap it")
    if existing is None and (part := transformed_part(model)):
        raise AdapterError(
            f"the part {part!r} of this model was transformed on its own; fold it, or transform the part"
        )
    check_no_part(model)
    bare = existing is not None  # rotations that are there would hide what reads the weights
    planned = _planned(model, rules, example_inputs, train, train_bias, trace=emit == "graph", bare=bare)
    check_storage(rules, planned.program.planned)
    if not planned.program.plan:
        raise RuleError("no site is left to rotate: every rule is optional or excludes what it matches")
    result = model if inplace else structural_copy(model) if existing is None else own_copy(model)
    insert(result, planned.program, adapter, trainable=trains(rules))
    store_of(result).activate(result, (adapter,))
    if inplace:
        forget_compiled()
    store_of(result).follow(result)
    return graph(result, example_inputs) if emit == "graph" else result


def add_adapter(
    model: nn.Module,
    adapter: str,
    rules: Rules | Plan,
    *,
    example_inputs: ExampleInputs = None,
    train: Sequence[str] = (),
    train_bias: str = "none",
    trainable: bool = True,
) -> Plan:
    """Add a further adapter to a transformed model, in place; it does not act until `set_adapter` names it.

    Args:
        model: a transformed model.
        adapter: its name.
        rules: see `oftfx.plan`.
        example_inputs: see `oftfx.plan`.
        train: see `oftfx.plan`.
        train_bias: see `oftfx.plan`.
        trainable: whether its parameters require gradients when it acts.

    Returns:
        The plan that was carried out.

    Raises:
        AdapterError: the model was never transformed, or has an adapter of that name.
        RuleError: see `oftfx.plan`.

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3)}, adapter="news")
        >>> plan = oftfx.add_adapter(model, "code", {"*": oftfx.OFT(2)})
        >>> plan["0"].blocks, oftfx.active_adapters(model)
        (3, ('news',))
    """
    check_name(adapter)
    root, store = switchable(model)
    if adapter in store.adapters:
        raise AdapterError(f"the model already has an adapter {adapter!r}; it has {', '.join(store.adapters)}")
    # A recording with adapters would show rotations of their own in front of sites that read the same.
    planned = _planned(root, rules, example_inputs, train, train_bias, trace=False, bare=True)
    check_storage(rules, planned.program.planned)
    if not planned.program.plan:
        raise RuleError("no site is left to rotate: every rule is optional or excludes what it matches")
    insert(root, planned.program, adapter, trainable=trainable and trains(rules))
    store.activate(root, store.active)
    return planned.program.plan


def _planned(
    model: nn.Module,
    rules: Rules | Plan,
    example_inputs: ExampleInputs,
    train: Sequence[str],
    train_bias: str,
    *,
    trace: bool,
    bare: bool = False,
) -> PassResult:
    if isinstance(rules, Plan):
        if train or train_bias != "none":
            raise RuleError("train and train_bias are part of a plan; give them to oftfx.plan instead")
        return PassResult(_carry_out(model, rules), True)
    check_own(model)
    program = Program.of(model)
    asked = asked_for(rules, program.index, train, train_bias)
    match = MatchRules(asked.rules, train=asked.train, train_bias=asked.train_bias)
    raw = _asked_parameters(program, asked.rules)
    planned = None if raw else PassManager([match]).run(program)  # rules are checked before the slow part
    shares = any(spec.share_input or spec.into == "producer" for spec in asked.specs)
    # A transformers model names inputs of its own; what reads the same tensor then rotates in one product.
    if planned is None or trace or shares or example_inputs is not None or names_inputs(model):
        recording = record_best(model, example_inputs, look_into=raw, bare=bare)
        found = PassManager([FindFunctional()]).run(program.with_(recording=recording))
        if planned is None or found.modified:  # other sites than the module tree shows
            planned = PassManager([match]).run(found.program)
        recorded = planned.program.with_(recording=recording)
        return PassManager([ShareInputs(), FindProducers(), MeasureCoverage()]).run(recorded)
    return PassManager([MeasureCoverage()]).run(planned.program)


def _asked_parameters(program: Program, rules: Sequence[Rule]) -> set[nn.Module]:
    """Modules with a parameter that rules name and that only a recording shows the meaning of."""
    found = set()
    for path, holder, _ in unreachable(program):
        rule = next((r for r in rules if r.matches_name(path) or r.matches_name(holder)), None)
        module = program.index.modules[holder]
        if rule is not None and rule.spec is not None and path not in program.refused and can_look_into(module):
            found.add(module)
    return found


def _carry_out(model: nn.Module, plan: Plan) -> Program:
    """A program with a ready plan, after checking that the plan fits the model."""
    program = Program.of(model)
    sites = {s.fqn: s for s in program.sites}
    entries = []
    for entry in plan:
        found = sites.get(entry.fqn)
        if not entry.site.is_layer and (found is None or found.is_layer) and fits(model, entry.site):
            found = entry.site  # a parameter that only a recording shows the meaning of
        if found is None:
            raise RuleError(f"the plan rotates {entry.fqn}, which {type(model).__name__} does not have as a layer")
        if found.in_features != entry.site.in_features:
            raise RuleError(
                f"the plan was made for {entry.fqn} with in_features {entry.site.in_features}; this model's has "
                f"{found.in_features}"
            )
        # The plan may come from a float or a meta model; format and dtype are those of the layer that is here.
        placement = entry.placement if entry.placement in found.placements else choose_placement(found, entry.spec)
        kernel, _ = choose_kernel(program.index.modules[found.module], entry.spec.kernel)
        entries.append(replace(entry, site=found, placement=placement, kernel=kernel))
    return program.with_(plan=replace(plan, entries=tuple(entries)))
