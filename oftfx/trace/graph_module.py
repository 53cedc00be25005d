"""The recorded graph as a module with the model's own names."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn

from oftfx.errors import GuardError
from oftfx.model.structure import twin
from oftfx.placement.base import owner_of


class ProgramGraph(fx.GraphModule):
    """A recorded program: an ``fx.GraphModule`` whose names, Parameter objects and buffers are the model's.

    It takes the arguments it was recorded with and returns what the model returns; a `ShapeGuard` is its first node.

    Attributes:
        eager: the model it was recorded from, over the same parameters; not a submodule.
        on_miss: what happens to a call that the recording does not stand for: ``"error"``, or ``"eager"`` to let the
            model itself answer it.
    """

    eager: nn.Module
    on_miss: str = "error"

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramGraph:
        result = super().__deepcopy__(memo)
        # fx copies only what its nodes name; the rest of the tree and the ties between its levels follow here.
        for name in (
            "_modules",
            "_parameters",
            "_buffers",
            "_non_persistent_buffers_set",
            "training",
            "eager",
            "on_miss",
        ):
            result.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        return result

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph.

        Raises:
            GuardError: arguments other than the recorded ones, or values that the recording does not stand for, unless
                ``on_miss`` is ``"eager"``.
        """
        if self.on_miss == "eager" and not torch.compiler.is_compiling():
            try:
                return self._checked(*args, **kwargs)
            except GuardError:
                # Only where it has to: parts of the model may be in another mode than the whole (a frozen batch norm).
                if self.eager.training != self.training:
                    self.eager.train(self.training)
                return self.eager(*args, **kwargs)
        return self._checked(*args, **kwargs)

    def _checked(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            try:
                inspect.signature(self.forward).bind(*args, **kwargs)
            except TypeError as error:
                raise GuardError(
                    f"graph: {error}; recorded for ({', '.join(inspect.signature(self.forward).parameters)}). "
                    "Record again with these arguments (oftfx.graph), or call the model itself"
                ) from None
        return super().__call__(*args, **kwargs)


def build(model: nn.Module, graph: fx.Graph, constants: dict[str, torch.Tensor], guard: nn.Module) -> ProgramGraph:
    """Make the module: leaves are twins of the model's, levels above them bare modules over the same dictionaries."""
    called = {n.target for n in graph.nodes if n.op == "call_module"}
    # fx copies what the nodes name out of the root; the canonical tree replaces it below.
    root = nn.Module()
    root.add_module("_guard", guard)
    stand_ins = {str(t): nn.Identity() for t in called if t != "_guard"}
    stand_ins["_guard"] = guard  # type: ignore[assignment]
    attributes = {str(n.target): torch.empty(0) for n in graph.nodes if n.op == "get_attr"}
    result = ProgramGraph({**stand_ins, **attributes}, graph, class_name=f"{type(model).__name__}Graph")
    tree = _skeleton(model, "", called)
    result._modules = {**tree._modules, "_guard": guard}
    result._parameters = tree._parameters
    result._buffers = {**tree._buffers, **constants}
    result._non_persistent_buffers_set = tree._non_persistent_buffers_set | set(constants)
    result.__dict__["eager"], result.__dict__["on_miss"] = model, "error"
    result.training = model.training
    guard.training = model.training
    return result


def _skeleton(module: nn.Module, path: str, called: set[Any]) -> nn.Module:
    if path in called:
        leaf = twin(module)
        _drop_rotation_hook(leaf)
        return leaf
    level = nn.Module()
    level._parameters, level._buffers = module._parameters, module._buffers
    level._non_persistent_buffers_set = module._non_persistent_buffers_set
    level.training = module.training
    for name, child in module._modules.items():
        level._modules[name] = None if child is None else _skeleton(child, f"{path}.{name}" if path else name, called)
    return level


def _drop_rotation_hook(leaf: nn.Module) -> None:
    """In the graph the rotation is a node of its own."""
    for registered in (leaf._forward_pre_hooks, leaf._forward_hooks):
        for key in [k for k, h in registered.items() if owner_of(h) is not None]:
            del registered[key]
    for flags in (leaf._forward_pre_hooks_with_kwargs, leaf._forward_hooks_with_kwargs):
        for key in [k for k in flags if k not in leaf._forward_pre_hooks and k not in leaf._forward_hooks]:
            del flags[key]
