"""What one call of a module reads in a Parameter's place.

A rotated weight belongs to a call, not to a module: two threads may be in one layer with different weights (one
trains, one evaluates), a module may be called inside itself, a call may end in an exception. So it is kept with the
call. `Parameters` stands for the module's ``_parameters``, the dictionary in which ``nn.Module.__getattr__`` looks a
Parameter up, and there asks which call this thread is in. Names, class, ``state_dict`` and whoever handles the
dictionary itself (``functional_call``, FSDP, a loader) meet Parameters only; nothing is written to the module, so
nothing can stay in it.

No lock does this: forwards that run in lockstep wait for each other inside layers, and two locked layers that call each
other would wait for ever. Nor does a context variable alone: torch runs its hooks after an ``Exception`` only, so
what Ctrl-C ends would stand for the rest of the session. A call is therefore known by its frame as well, which is on
the stack of its thread or has ended.

A checkpoint inside a reader's forward runs a part of it again in backward, when the call is long over and perhaps in
another thread. What reads the weight there gets it rotated anew.

Dynamo knows nothing of calls and reads a dictionary of this kind as a plain one. What it traces through the hooks it
gets in another way (`RotateWeight`). Where it cannot follow a reader and runs its pieces one by one, a piece would be
compiled with the Parameter, so such a reader runs without Dynamo until its call ends.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.placement.torch_private import is_recomputing, never_compiled_alone
from oftfx.placement.unsaved import Lent


class Owner(Protocol):
    """Whoever makes what is read."""

    def recomputed(self) -> Tensor | None:
        """What is read when backward runs a part of a call again; None for the Parameter itself."""


@dataclass(slots=True, eq=False)
class _Call:
    """A call of a reader that is running in this thread.

    Attributes:
        owner: who has opened it.
        parameters: of the module that holds the weight.
        name: the weight's name there.
        tensor: what is read instead; None for the Parameter itself.
        frame: of the call; None where it is not to be found, and the call counts as running until it is closed.
        compiler: Dynamo's callback, which rests meanwhile.
        lent: what the reader's saved tensors are exchanged for when it has ended.
    """

    owner: Owner
    parameters: Parameters
    name: str
    tensor: Tensor | None
    frame: FrameType | None
    compiler: Any
    lent: list[Lent]

    @never_compiled_alone
    def is_running(self) -> bool:
        """Whether the call has not ended."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is self.frame


class _Open(threading.local):
    """The calls that a thread is in, the innermost last."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []


_OPEN = _Open()
_LOCK = threading.Lock()


class Parameters(dict[str, Any]):
    """``_parameters`` of a module that holds a weight which calls read in another form.

    Attributes:
        owners: name of each such weight to who makes what is read.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.owners: dict[str, Owner] = {}

    @never_compiled_alone
    def __getitem__(self, name: str) -> Any:
        """What an attribute of that name is in this thread now; in any other use, the Parameter."""
        if torch.compiler.is_dynamo_compiling():
            return super().__getitem__(name)
        if name in self.owners and sys._getframe(1).f_code.co_name == "__getattr__":
            tensor = self._read(name)
            if tensor is not None:
                return tensor
        return super().__getitem__(name)

    @never_compiled_alone
    def _read(self, name: str) -> Tensor | None:
        for call in reversed(_OPEN.calls):
            if call.name == name and call.parameters is self and call.is_running():
                return call.tensor
        return self.owners[name].recomputed() if is_recomputing() else None


def prepare(owner: Owner, module: nn.Module, name: str) -> Parameters:
    """The module's parameters, so that a call may read another tensor under that name."""
    parameters = module._parameters
    if type(parameters) is Parameters and parameters.owners.get(name) is owner:
        return parameters
    with _LOCK:
        parameters = module._parameters
        if type(parameters) is not Parameters:  # not yet, or a plain copy by whoever copies modules
            module.__dict__["_parameters"] = parameters = Parameters(parameters)
        parameters.owners[name] = owner
        return parameters


def restore(owner: Owner, module: nn.Module, name: str) -> None:
    """Inverse of `prepare`; with the last name, the dictionary is a plain one again."""
    with _LOCK:
        parameters = module._parameters
        if type(parameters) is Parameters and parameters.owners.get(name) is owner:
            del parameters.owners[name]
            if not parameters.owners:
                module.__dict__["_parameters"] = dict(parameters)


def open_call(owner: Owner, module: nn.Module, name: str, tensor: Tensor | None, compiler: Any) -> None:
    """Let the call whose pre-hook runs now read ``tensor`` for ``module.<name>``, in this thread, until it ends."""
    lent = Lent.of_call(tensor)
    calls = _OPEN.calls
    if calls:  # some may have ended without a word
        calls[:] = [c for c in calls if c.is_running()]
    parameters = prepare(owner, module, name)
    calls.append(_Call(owner, parameters, name, tensor, _frame(), compiler, [] if lent is None else [lent]))


def is_inside() -> bool:
    """Whether this thread is in any call that was opened."""
    return bool(_OPEN.calls)


def close_call(owner: Owner) -> tuple[Any, list[Lent]]:
    """The call whose hook runs now has ended.

    Returns:
        The ``compiler`` it was opened with, None if it was not, and what was lent to a reader that nobody else of this
        frame will close.
    """
    calls = _OPEN.calls
    if not calls:
        return None, []
    frame = _frame()
    # A reader may have several weights, whose hooks leave in the order in which they came.
    for index in reversed(range(len(calls))):
        if calls[index].owner is owner and calls[index].frame is frame:
            call = calls.pop(index)
            others = [c for c in calls if c.frame is frame] if frame is not None else []
            if not others:
                return call.compiler, call.lent
            others[0].lent += call.lent
            return call.compiler, []
    return None, []


def _frame() -> FrameType | None:
    """Of the innermost call of a module: whoever wraps a hook stands between it and this one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_call_impl":
        frame = frame.f_back
    return frame
