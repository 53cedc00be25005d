"""Plan a model, put rotations into it, show its program."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch.nn as nn

from oftfx.adapter.store import Adapter, check_name, find_store, store_of, transformed_part, unwrapped
from oftfx.errors import AdapterError, OftfxWarning, RuleError, TraceError
from oftfx.formats.exact import choose_kernel
from oftfx.model.huggingface import allow_training, note_zeros
from oftfx.model.names import child_name
from oftfx.model.sites import choose_placement, fits
from oftfx.model.structure import structural_copy
from oftfx.passes.find_functional import FindFunctional
from oftfx.passes.find_producers import FindProducers
from oftfx.passes.insert_rotations import InsertRotations
from oftfx.passes.match_rules import MatchRules
from oftfx.passes.measure_coverage import MeasureCoverage
from oftfx.passes.protocol import PassManager, PassResult
from oftfx.passes.share_inputs import ShareInputs
from oftfx.placement import SiteRotations
from oftfx.plans import Plan
from oftfx.program import Program
from oftfx.rules import Rule, Rules, read_rules
from oftfx.trace.graph_module import ProgramGraph
from oftfx.trace.inputs import ExampleInputs, names_inputs
from oftfx.trace.record import record, record_best
from oftfx.unreachable import can_look_into, unreachable

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
        rules: see `oftfx.rules.read_rules`; first match wins.
        example_inputs: a dict of keyword arguments or a tuple, to record the program with; transformers models name
            their own. Without a recording the plan is made from the module tree, and says so.
        train: names or globs of further modules that train whole and are saved with the adapter.
        train_bias: biases that train: ``"none"``, ``"all"``, or ``"oft"`` for those of rotated layers.

    Raises:
        RuleError: a rule that cannot be understood, matches nothing or does not divide.
    """
    return _planned(model, rules, example_inputs, train, train_bias, trace=True).program.plan  # type: ignore[return-value]


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
        inplace: change ``model`` itself. Otherwise the result is a module tree of its own over the same tensors.
        emit: ``"modules"``, or ``"graph"`` for an executable, trainable ``fx.GraphModule`` with the rotations as nodes.

    Raises:
        RuleError: see `plan`; raised before anything changes.
        AdapterError: the name is taken or cannot be an attribute name.
        TraceError: ``emit="graph"`` and the program cannot be recorded.
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
    planned = _planned(model, rules, example_inputs, train, train_bias, trace=emit == "graph")
    if not planned.program.plan:
        raise RuleError("no site is left to rotate: every rule is optional or excludes what it matches")
    result = model if inplace else structural_copy(model)
    insert(result, planned.program, adapter, trainable=True)
    store_of(result).activate(result, (adapter,))
    return graph(result, example_inputs) if emit == "graph" else result


def insert(model: nn.Module, program: Program, adapter: str, *, trainable: bool) -> Adapter:
    """Insert a planned adapter into ``model``, inactive, and enter it in the model's store."""
    assert program.plan is not None
    check_insertable(model, program.plan)
    first = find_store(model) is None
    result = PassManager([InsertRotations(adapter, activate=False)]).run(program.with_(model=model))
    store = store_of(model)
    if first:
        store.freeze_base(model)
        allow_training(model)
        note_zeros(model)
    return store.add(model, Adapter(adapter, _noted(program.plan, result)), trainable=trainable)


def check_insertable(model: nn.Module, plan: Plan) -> None:
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
        child = model.get_submodule(entry.site.module)._modules.get(child_at)
        if child is not None and not isinstance(child, SiteRotations):
            raise AdapterError(
                f"{entry.fqn} has a child {child_at!r} of its own ({type(child).__name__}), where a rotation would go"
            )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in plan.train:
        if name not in parameters:
            raise RuleError(f"the plan trains {name}, which {type(model).__name__} does not have as a parameter")
        if not parameters[name].is_floating_point():
            raise AdapterError(
                f"{name} is stored as {parameters[name].dtype} and cannot train; name float modules only"
            )


def _noted(plan: Plan, result: PassResult) -> Plan:
    """The plan with what the layers' formats had to undo, which the user also gets as one warning."""
    notices = {c.site: c.reason for c in result.changes if c.reason}
    for text, sites in Counter(notices.values()).items():
        where = next(s for s, t in notices.items() if t == text)
        warnings.warn(f"{sites} layers, e.g. {where}: {text}", OftfxWarning, stacklevel=4)
    entries = tuple(replace(e, notes=(*e.notes, notices[e.fqn])) if e.fqn in notices else e for e in plan)
    return replace(plan, entries=entries)


def graph(
    model: nn.Module, example_inputs: ExampleInputs = None, *, on_miss: Literal["error", "eager"] = "error"
) -> ProgramGraph:
    """Record the whole program of a model as an executable graph, active rotations as explicit nodes.

    Sizes of the inputs stay free where the program allows it; a guard, the graph's first node, refuses calls that the
    recording does not stand for. Parameters are the same objects under the same names.

    Args:
        model: any module, transformed or not.
        example_inputs: see `plan`. Sizes 0 and 1 are taken as fixed.
        on_miss: what a call that the guard refuses gets: a clear error, or the answer of the model itself.

    Raises:
        RuleError: another ``on_miss``.
        TraceError: the program depends on data, or cannot be recorded for another reason (which is named).
    """
    if on_miss not in ("error", "eager"):
        raise RuleError(f"on_miss: got {on_miss!r}, expected 'error' or 'eager'")
    try:
        recording = record(model, example_inputs, dynamic=True, executable=True)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be recorded on fake tensors: {type(error).__name__}: {error}. "
            "emit='modules' needs no recording"
        ) from error
    if recording.rung != "graph":
        raise TraceError(f"{type(model).__name__} cannot become a graph: {recording.reason}")
    assert recording.module is not None
    other = _recorded_in_other_mode(model, example_inputs)
    if not _same_program(recording.graph, other):
        guard = recording.module.get_submodule("_guard")
        guard.recorded_training = model.training  # type: ignore[assignment]
    recording.module.on_miss = on_miss
    return recording.module


def _planned(
    model: nn.Module,
    rules: Rules | Plan,
    example_inputs: ExampleInputs,
    train: Sequence[str],
    train_bias: str,
    *,
    trace: bool,
) -> PassResult:
    if isinstance(rules, Plan):
        if train or train_bias != "none":
            raise RuleError("train and train_bias are part of a plan; give them to oftfx.plan instead")
        return PassResult(_carry_out(model, rules), True)
    asked = read_rules(rules)
    train = [*train, *(getattr(rules, "modules_to_save", None) or ())]
    if getattr(rules, "peft_type", None) is not None and train_bias == "none":
        bias: str = rules.bias  # type: ignore[union-attr]
        train_bias = "oft" if bias == "oft_only" else bias
    program = Program.of(model)
    match = MatchRules(asked, train=train, train_bias=train_bias)
    raw = _asked_parameters(program, asked)
    if not raw:
        # Rules are checked before the slow part.
        result = PassManager([match, MeasureCoverage()]).run(program)
    shares = any(r.spec is not None and (r.spec.share_input or r.spec.into == "producer") for r in asked)
    # A transformers model names inputs of its own; what reads the same tensor then rotates in one product.
    if raw or trace or shares or example_inputs is not None or names_inputs(model):
        recorded = program.with_(recording=record_best(model, example_inputs, look_into=raw))
        result = PassManager([FindFunctional(), match, ShareInputs(), FindProducers(), MeasureCoverage()]).run(recorded)
    return result


def _asked_parameters(program: Program, rules: Sequence[Rule]) -> set[nn.Module]:
    """Modules with a parameter that rules name and that only a recording shows the meaning of."""
    found = set()
    for path, holder, _ in unreachable(program):
        rule = next((r for r in rules if r.matches_name(path) or r.matches_name(holder)), None)
        module = program.model.get_submodule(holder)
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
        kernel, _ = choose_kernel(model.get_submodule(found.module), entry.spec.kernel)
        entries.append(replace(entry, site=found, placement=placement, kernel=kernel))
    return program.with_(plan=replace(plan, entries=tuple(entries)))


def _recorded_in_other_mode(model: nn.Module, example_inputs: Any) -> Any:
    modes = [(m, m.training) for m in model.modules()]
    model.train(not model.training)
    try:
        return record(model, example_inputs, dynamic=True).graph
    finally:
        for module, mode in modes:
            module.training = mode


def _same_program(a: Any, b: Any) -> bool:
    """Whether two recordings have the same nodes with the same constants; inputs, guard and output aside."""

    def text(graph: Any) -> list[str]:
        skipped = ("placeholder", "output")
        nodes = [n for n in graph.nodes if n.op not in skipped and n.target != "_guard"]
        return [f"{n.op} {n.target} {n.args} {n.kwargs}" for n in nodes]

    return text(a) == text(b)
