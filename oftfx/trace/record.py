"""Record a model: the ladder of rungs, and what comes out."""

from __future__ import annotations

import inspect
import operator
import threading
import time
import weakref
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn

from oftfx.errors import TraceError, UnrecordableError
from oftfx.model.running import tensors_of
from oftfx.model.structure import tensors_in
from oftfx.placement.rows import check_no_rows
from oftfx.trace.foreign import foreign, is_bug
from oftfx.trace.graph_module import ProgramGraph, build
from oftfx.trace.guards import ShapeGuard
from oftfx.trace.inputs import ExampleInputs, example_call, plain_configs
from oftfx.trace.leaves import leaf_modules
from oftfx.trace.outside import Outside
from oftfx.trace.recorder import Recorder
from oftfx.trace.torch_private import fake_tensors, is_fake, pytree, size_conditions
from oftfx.trace.undisturbed import StandIn, random_state

# Modes of fake tensors count themselves in flags of the whole process, which two at once leave set for ever.
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class Recording:
    """A recorded program.

    Attributes:
        rung: ``"graph"``, ``"analysis"`` or ``"tree"``.
        graph: the nodes; empty on the rung ``"tree"``.
        reason: why not a higher rung.
        calls: how often each module ran, by path.
        seconds: time it took.
        module: the executable graph, where it was asked for and possible.
    """

    rung: str
    graph: fx.Graph = field(default_factory=fx.Graph)
    reason: str = ""
    calls: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    module: ProgramGraph | None = None


def record_best(
    model: nn.Module,
    example_inputs: ExampleInputs = None,
    *,
    look_into: Collection[nn.Module] = (),
    bare: bool = False,
) -> Recording:
    """Record for analysis on the highest rung that works; whatever the model raises is a reason to go a rung lower.

    Fake tensors with the example's sizes first, then real values, then the module tree alone. ``look_into`` and
    ``bare``: see `record`.
    """
    check_no_rows(model, "a recording")
    reasons: list[str] = []
    for fake in (True, False):
        try:
            return record(model, example_inputs, fake=fake, reason="; ".join(reasons), look_into=look_into, bare=bare)
        except UnrecordableError as error:
            return Recording("tree", reason=_first_line(error))
        except Exception as error:
            if is_bug(error):
                raise
            reasons.append(f"{'fake' if fake else 'real'} values: {_first_line(error)}")
    return Recording("tree", reason="; ".join(reasons))


def record(
    model: nn.Module,
    example_inputs: ExampleInputs = None,
    *,
    fake: bool = True,
    dynamic: bool = False,
    executable: bool = False,
    training: bool | None = None,
    gradients: bool = True,
    bare: bool = False,
    reason: str = "",
    look_into: Collection[nn.Module] = (),
) -> Recording:
    """Run a copy of ``model`` once and record its program; other threads may run the model meanwhile.

    Args:
        model: any module; also one on the meta device.
        example_inputs: a dict of keyword arguments or a tuple; see `oftfx.plan`.
        fake: run on fake tensors: no arithmetic, no memory, and a branch on data is an error instead of a guess.
        dynamic: keep input sizes symbolic, so the graph stands for other sizes as well.
        executable: also build `Recording.module`.
        training: the mode to record in; None for the model's. Real values always run in eval mode.
        gradients: record with gradients enabled; real values always run without.
        bare: without the adapters that act now.
        reason: why a higher rung was not possible, for the result.
        look_into: modules without a site that are recorded operation by operation all the same, for the parameters
            that they use by themselves.

    Raises:
        UnrecordableError: no example inputs, or something in the model that cannot be copied.
        TraceError: a value that cannot stand in a graph.
        Exception: what the model itself raises on these inputs.
    """
    call = example_call(model, example_inputs)
    run = _Run(model, call, fake, dynamic, executable, training, gradients, bare, reason, look_into)
    with _ONE_AT_A_TIME:  # also what is looked at before and brought back: two would take each other's for the model's
        if not fake:
            return run.recording()
        outside = Outside(model)
        try:
            result = run.recording()
        except BaseException as error:
            outside.restore(run.made, error)
            raise
        outside.restore(run.made)
    return result


@dataclass
class _Run:
    """One recording; the arguments of `record`."""

    model: nn.Module
    call: tuple[tuple[Any, ...], dict[str, Any]]
    fake: bool
    dynamic: bool
    executable: bool
    training: bool | None
    gradients: bool
    bare: bool
    reason: str
    look_into: Collection[nn.Module]
    made: list[weakref.ref[torch.Tensor]] = field(default_factory=list)  # fake tensors, to be gone when it is over

    def recording(self) -> Recording:
        start = time.perf_counter()
        model = self.model
        names = _argument_names(model, *self.call)
        with ExitStack() as after:
            stand_in = StandIn(model, real=not self.fake, training=self.training, bare=self.bare)
            after.callback(stand_in.dissolve)
            root = stand_in.module
            inside = {root.get_submodule(n) for n, m in model.named_modules() if m in self.look_into}
            leaves = leaf_modules(root, stand_in.formats, inside)
            recorder = Recorder(root, model, leaves, made=self.made if self.fake else None)
            after.callback(recorder.release)
            out, values, shape_env = self._forward(recorder, names)
            module = None
            if self.executable:
                self._check_again(recorder, names)
                recorder.graph.output(_output(recorder, out))
                guard = _guard(model, names, values, shape_env if self.dynamic else None, recorder.asked)
                _insert_guard(recorder.graph)
                constants = {n: stand_in.original(t) for n, t in recorder.values.constants.items()}
                module = build(model, recorder.graph, constants, guard)
            else:
                # Nothing can build the result from these; they say which values somebody outside reads.
                recorder.graph.output(recorder.values.known(tensors_of(out)))
        doubts = [self.reason] if self.reason else []
        doubts += recorder.doubts()
        rung = "graph" if self.fake and not doubts else "analysis"
        seconds = time.perf_counter() - start
        return Recording(rung, recorder.graph, "; ".join(doubts), dict(recorder.calls), seconds, module)

    def _forward(self, recorder: Recorder, names: list[str]) -> tuple[Any, list[Any], Any]:
        """Run the recorder's copy once; gives its result, the arguments, and the environment of symbolic sizes."""
        args, kwargs = self.call
        values, shape_env = _apart([*args, *kwargs.values()]), None
        with ExitStack() as stack:
            stack.enter_context(plain_configs(recorder.root))
            if self.fake:
                shape_env, values = stack.enter_context(fake_tensors(values, dynamic=self.dynamic))
            else:
                stack.enter_context(random_state(self.model))
            _placeholders(recorder, names, values)
            # Gradients only matter to the real thing; a quantized layer may behave differently without them.
            stack.enter_context(torch.set_grad_enabled(self.fake and self.gradients))
            new = dict(zip(kwargs, values[len(args) :], strict=True))
            with recorder.recording():
                return foreign(recorder.root, *values[: len(args)], **new), values, shape_env

    def _check_again(self, first: Recorder, names: list[str]) -> None:
        """Record the same copy a second time: a model that keeps something for its next call is no graph.

        Raises:
            TraceError: the second call computes something else.
        """
        root = first.root
        again = Recorder(root, self.model, first.leaves, made=self.made)
        try:
            self._forward(again, names)
            pairs = zip_longest(_texts(first), _texts(again), fillvalue=("", ""))
            differing = next((a[0] or b[0] or type(self.model).__name__ for a, b in pairs if a != b), "")
            where = first.values.replaced(again.values) or differing
        except Exception as error:  # of a tensor that is left from the first call: in a cache outside, or on the model
            if is_bug(error):
                raise
            where = next((n or type(self.model).__name__ for n, m in root.named_modules() if _keeps(m)), "")
        finally:
            again.release()
        if where:
            raise TraceError(
                f"a second call of the model computes something else than the first, in {where}: it keeps something "
                "for its next call, which a graph would not. Write into a buffer instead (self.n.add_(1)), or use "
                "emit='modules'"
            )


def _keeps(module: nn.Module) -> bool:
    return any(is_fake(t) for t in tensors_in({k: v for k, v in vars(module).items() if k != "_modules"}, set()))


def _texts(recorder: Recorder) -> list[tuple[str, str]]:
    nodes = [n for n in recorder.graph.nodes if n.op != "placeholder"]
    return [(str(n.meta.get("module", "")), f"{n.op} {n.target} {n.args} {n.kwargs}") for n in nodes]


def _argument_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    parameters = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    positional = [parameters[i] if i < len(parameters) else f"arg_{i}" for i in range(len(args))]
    return [*positional, *kwargs]


def _placeholders(recorder: Recorder, names: list[str], values: list[Any]) -> None:
    """One placeholder an argument; tensors inside containers are read from it."""
    # Python wants arguments without default first, so only what follows the last tensor gets one.
    last = max((i for i, v in enumerate(values) if _leaves(v)), default=-1)
    holders = []
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        default = (value,) if index > last else ()
        holders.append(recorder.graph.create_node("placeholder", name, default, name=name))
    for holder, value in zip(holders, values, strict=True):
        for path, tensor in _leaves(value):
            node = holder
            for key in path:
                node = recorder.graph.call_function(_getitem(key), (node, _key(key)))
            recorder.values.bind(tensor, node)
    for holder in [recorder.values.node_of(t) for v in values for _, t in _leaves(v)]:
        for dim, size in enumerate(holder.meta["value"].shape):
            recorder.values.symbols.define(size, holder, dim)


def _leaves(value: Any) -> list[tuple[Any, torch.Tensor]]:
    return [(p, t) for p, t in pytree.tree_flatten_with_path(value)[0] if isinstance(t, torch.Tensor)]


def _getitem(key: Any) -> Any:
    return getattr if isinstance(key, pytree.GetAttrKey) else operator.getitem


def _key(key: Any) -> Any:
    return getattr(key, "key", getattr(key, "idx", getattr(key, "name", None)))


def _guard(model: nn.Module, names: list[str], values: list[Any], shape_env: Any, asked: set[str]) -> ShapeGuard:
    tensors = [t for v in values for _, t in _leaves(v)]
    expression = "" if shape_env is None else size_conditions(shape_env, tensors)
    return ShapeGuard(type(model).__name__, dict(zip(names, values, strict=True)), expression, asked)


def _apart(values: list[Any]) -> list[Any]:
    """The same with an object of its own for every place: one that stands at two would be recorded as one input."""
    seen = set[int]()

    def own(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            return tensor
        return tensor.detach().requires_grad_(tensor.requires_grad)

    return [pytree.tree_map_only(torch.Tensor, own, value) for value in values]


def _insert_guard(graph: fx.Graph) -> None:
    """Before the first read of a nested input or a size."""
    holders = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_after(holders[-1]):
        graph.call_module("_guard", tuple(holders))


def _output(recorder: Recorder, out: Any) -> Any:
    """The model's result as structure over nodes: tensors, containers, transformers' ModelOutput."""
    if isinstance(out, torch.Tensor):
        return recorder.values.node_of(out)
    if out is None or isinstance(out, (int, float, str, bool)):
        return out
    if isinstance(out, dict) and type(out) is not dict:
        fields = {k: _output(recorder, v) for k, v in out.items()}
        return recorder.graph.call_function(type(out), (), fields)
    if isinstance(out, dict):
        return {k: _output(recorder, v) for k, v in out.items()}
    if isinstance(out, tuple) and hasattr(out, "_fields"):
        return recorder.graph.call_function(type(out), tuple(_output(recorder, v) for v in out))
    if isinstance(out, (tuple, list)):
        return foreign(type(out), [_output(recorder, v) for v in out])
    raise TraceError(f"the model returned a {type(out).__name__}, which a graph cannot build")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
