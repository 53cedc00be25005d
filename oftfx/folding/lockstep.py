"""Run a model on several inputs side by side, so that each layer can be changed once it has seen all of them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.folding.inputs import is_of_input, not_taken
from oftfx.folding.peers import Peers
from oftfx.folding.shown import Call
from oftfx.folding.spill import Spill, Watch
from oftfx.model.running import Inputs, call_once, evaluating, input_name

Show = Callable[[nn.Module, list[Tensor], list[Tensor | None]], None]
"""Gets a layer, what it reads in each forward that waits for it, and what it reads in the model beside."""


class _Stopped(BaseException):
    """Ends a forward that has nothing left to show; no handler of the model's own code should catch it."""


@dataclass
class _Run:
    """One forward, in a thread of its own; it moves only between `resume` and the next message it sends."""

    model: nn.Module
    inputs: Inputs
    resume: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    at: nn.Module | None = None
    call: Call | None = None
    finished: bool = False
    watch: Watch | None = None
    error: BaseException | None = None


class Lockstep:
    """Forwards of one model that wait for each other at given layers.

    The forward of every input runs until it reaches a layer of ``layers``. When none can go on, the first such layer is
    shown with all inputs that wait for it, and may be changed; then these forwards go on with the changed layer. So in
    one pass over the data each layer is treated knowing what the ones before it have become, whatever the model's code
    looks like; no list of blocks is needed. Only one forward computes at a time; what the others keep is what they need
    to go on, as the cached inputs of a block would be; no cache of keys and values, unless an input asks for one. After
    the last layer all forwards end.

    A layer that only some inputs reach (an expert) is shown with those; one that is reached again (a shared layer) is
    shown the first time.

    A second model can run beside, on the same inputs: each forward of it waits at the layer that its fellow waits at,
    and both are shown. Where a fellow never comes there (an expert that this input reaches in one model only), nothing
    is shown of it.

    Args:
        model: runs in eval mode, without gradients.
        layers: the layers to stop at, in the order to prefer where forwards wait at different ones.
        beside: another model and its layers, one for each of ``layers``.
        spill: where waiting forwards keep what they hold; None: in memory.
        peers: processes that run the same model on inputs of their own: each layer is shown in all of them at the same
            time, also where no input of this one waits for it.

    Attributes:
        calls: of the layer that is being shown, one for each of its inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        beside: tuple[nn.Module, Sequence[nn.Module]] | None = None,
        spill: Spill | None = None,
        peers: Peers | None = None,
    ) -> None:
        self.spill, self._peers = spill, peers or Peers()
        self.model, self.layers = model, list(layers)
        self.beside = None if beside is None else beside[0]
        self._fellow = {} if beside is None else dict(zip(self.layers, beside[1], strict=True))
        self._rank = {m: i for i, m in enumerate(self.layers)}
        self._open = {*self.layers, *self._fellow.values()}
        self._messages: queue.SimpleQueue[_Run] = queue.SimpleQueue()
        self._here = threading.local()
        self._stopping = False
        self.calls: list[Call] = []

    def run(self, batches: Sequence[Inputs], show: Show) -> list[nn.Module]:
        """Show every layer once with the tensors it is about to read; returns the layers that no input reached."""
        runs = [_Run(self.model, b) for b in batches]
        fellows = [] if self.beside is None else [_Run(self.beside, b) for b in batches]
        everyone = [*runs, *fellows]
        if self.spill is not None:
            for run in everyone:
                run.watch = self.spill.watch()
        threads = [threading.Thread(target=self._forward, args=(r, _modes()), daemon=True) for r in everyone]
        handles = [m.register_forward_pre_hook(self._pause, prepend=True, with_kwargs=True) for m in self._open]
        try:
            with evaluating(self.model), nullcontext() if self.beside is None else evaluating(self.beside):
                for thread, run in zip(threads, everyone, strict=True):
                    thread.start()
                    self._move(run)
                while self._rank.keys() & self._open and (layer := self._next(runs)) is not None:
                    fellow = self._fellow.get(layer)
                    waiting = [(r, f) for r, f in zip_longest(runs, fellows) if r.at is layer]
                    others = [f.call.x if f is not None and f.call and f.at is fellow else None for _, f in waiting]
                    self.calls = [r.call for r, _ in waiting if r.call is not None]
                    show(layer, [c.x for c in self.calls], others)
                    self.calls = []
                    self._open -= {layer, fellow}
                    for run in [r for r in everyone if r.at is layer or (r.at is fellow and fellow is not None)]:
                        self._move(run)
        finally:
            self._stopping = True
            for thread, run in zip(threads, everyone, strict=True):
                run.resume.release()
                if thread.ident is not None:
                    thread.join()
            for handle in handles:
                handle.remove()
        return [m for m in self.layers if m in self._open]

    def _next(self, runs: Sequence[_Run]) -> nn.Module | None:
        """The first layer that forwards wait for; None where all have ended."""
        mine = min((self._rank[r.at] for r in runs if r.at is not None), default=None)
        waiting = [at for at in self._peers.exchange("which layer is next", mine) if at is not None]
        return self.layers[min(waiting)] if waiting else None

    def _move(self, run: _Run) -> None:
        """Let one forward compute until it waits again or ends."""
        run.at = run.call = None
        run.resume.release()
        moved = self._messages.get()
        if moved.error is not None:
            if isinstance(moved.error, Exception) and is_of_input(moved.error):
                raise not_taken(moved.inputs, moved.error) from moved.error
            raise moved.error

    def _forward(self, run: _Run, modes: Callable[[], ExitStack]) -> None:
        run.resume.acquire()
        self._here.run = run
        try:
            if not self._stopping:
                with modes(), run.watch or nullcontext():
                    call_once(run.model, run.inputs)
        except _Stopped:
            pass
        except BaseException as error:  # carried over to the thread that waits for it
            run.error = error
        run.finished, run.at = True, None
        self._messages.put(run)

    def _pause(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run: _Run | None = getattr(self._here, "run", None)
        if run is None or module not in self._open:
            return
        if self._stopping:  # the model's code has caught the end and goes on
            raise _Stopped
        if run.watch is not None:
            run.watch.put_away()
        run.at, run.call = module, Call(args[0] if args else kwargs[input_name(module, kwargs)], args, kwargs)
        self._messages.put(run)
        run.resume.acquire()
        if self._stopping or not self._rank.keys() & self._open:
            raise _Stopped


def _modes() -> Callable[[], ExitStack]:
    """What a new thread does not inherit: no gradients; the caller's autocast, default device, device and stream."""
    devices = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    dtypes = {d: torch.get_autocast_dtype(d) for d in devices}
    try:
        default = torch.get_default_device()
    except AttributeError:  # torch 2.7, where somebody has called set_default_device(None)
        default = torch.device("cpu")
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def enter() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        for device in devices:
            stack.enter_context(torch.autocast(device, dtypes[device]))
        if default.type != "cpu":  # a thread begins with that
            stack.enter_context(default)
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))  # of its device, which becomes the current one
        return stack

    return enter
