"""What placements use of torch that it does not promise to keep."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def saved_tensor_hooks() -> Any:
    """The innermost hooks on saved tensors; they tell one checkpointed region from another. None outside of any."""
    # Without this name, what one region has made could be handed to the next, whose recomputation would then differ.
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks(True) if hooks is not None else None


def sequence_number(node: Any) -> int:
    """Of a node of autograd; larger than those of the nodes that this thread has made before it."""
    return int(node._sequence_nr())


def saved_by(node: Any) -> Iterator[tuple[Any, torch.Tensor]]:
    """What a node has saved for its backward and nobody's hooks see to: whom to give hooks, and the tensor itself."""
    kind: Any = type(node)
    for name in _names_of_saved(kind):
        try:
            found = getattr(node, name)
        except RuntimeError:  # backward has been there already
            continue
        for saved in found if isinstance(found, list | tuple) else (found,):
            tensor = getattr(saved, "data", None)
            if isinstance(tensor, torch.Tensor) and getattr(saved, "unpack_hook", saved) is None:
                yield saved, tensor


@lru_cache(maxsize=1024)
def _names_of_saved(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def never_compiled_alone(function: F) -> F:
    """Dynamo traces the function where it traces the caller, and never compiles a call of it for itself.

    `torch._dynamo.skip` would also break the caller's graph, and costs the import of Dynamo.
    """
    frames: Any = torch._C._dynamo.eval_frame
    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
    frames.set_code_exec_strategy(function.__code__, skip)
    return function


@never_compiled_alone
def is_recomputing() -> bool:
    """Whether backward runs a part of a forward again in this thread: it computes with gradients, as hooks do not."""
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1


@never_compiled_alone
def pause_dynamo() -> Any:
    """Let this thread run without Dynamo; returns what `resume_dynamo` is to be given."""
    return torch._C._dynamo.eval_frame.set_eval_frame(None)


def resume_dynamo(callback: Any) -> None:
    """Inverse of `pause_dynamo`."""
    if callback is not None:
        torch._C._dynamo.eval_frame.set_eval_frame(callback)


def is_compiled(function: Callable[..., Any]) -> bool:
    """Whether Dynamo starts when the function is called."""
    compiled = getattr(function, "_torchdynamo_orig_callable", None) is not None
    return compiled and not hasattr(function, "_torchdynamo_disable")


def traced_version(x: torch.Tensor) -> int:
    """How often a tensor was written to before this point of a trace."""
    if not torch.compiler.is_dynamo_compiling():
        return x._version
    # To the traced code a version is a number of the run; that of the trace is the stand-in's.
    version = 0
    torch._dynamo.comptime.comptime(_note_version)
    return version


def _note_version(context: Any) -> None:
    from torch._dynamo.variables import ConstantVariable

    frame = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    frame.symbolic_locals["version"] = ConstantVariable.create(context.get_local("x").as_fake()._version)


def forget_compiled() -> None:
    """Let code that Dynamo has compiled be compiled anew, of every model: it does not see that hooks came or went."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
