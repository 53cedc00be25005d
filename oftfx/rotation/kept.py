"""Blocks that are kept from one forward to the next, until what they are made from has changed."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from oftfx.rotation.autocast import without_autocast
from oftfx.rotation.caching import capturing, steps
from oftfx.rotation.glimpse import Glimpse
from oftfx.rotation.recipe import blocks_by, read_recipe

_NUMBERS = itertools.count(1)
_LOCK = threading.Lock()


class Source:
    """A tensor that blocks are made from, and all blocks that are kept of it.

    It is found by the tensor and goes with it, so no module has a buffer for them: they are in no ``state_dict``, no
    copy and no pickle, and nobody moves, shards, broadcasts or offloads them.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Callable[[], Tensor | None] = weakref.ref(tensor)
        self._number = next(_NUMBERS)
        self._glimpse = Glimpse()
        self._kept: dict[Any, Kept] = {}
        self._with_others: weakref.WeakSet[Kept] = weakref.WeakSet()

    def state(self, tensor: Tensor) -> tuple[Any, ...]:
        """What is another one whenever the numbers of the tensor may be others; the glimpse starts with the address."""
        return self._number, tensor._version, self._glimpse.at(tensor), tensor.device

    def stamp(self, tensor: Tensor) -> tuple[Any, ...]:
        """The same for any kind of tensor."""
        version = 0 if tensor.is_inference() else tensor._version
        return self._number, version, self._glimpse.of(tensor) if type(tensor) is nn.Parameter else b""

    def kept(self, others: tuple[Source, ...], texts: tuple[str, ...], dtype: torch.dtype) -> Kept:
        """The blocks of this one and of others, side by side."""
        key = others, texts, dtype
        found = self._kept.get(key)
        if found is None:
            with _LOCK:
                found = self._kept.setdefault(key, Kept((self, *others), texts, dtype))
                for other in others:
                    other._with_others.add(found)
        return found

    def forget(self) -> None:
        """Take nothing that is kept for right any more."""
        self._number = next(_NUMBERS)
        self._glimpse.forget()
        for kept in [*self._kept.values(), *self._with_others]:
            kept.forget()


_SOURCES = WeakIdKeyDictionary()


def source_of(tensor: Tensor) -> Source:
    """The one of a tensor."""
    found: Source | None = _SOURCES.get(tensor)
    if found is None:
        with _LOCK:
            found = _SOURCES.setdefault(tensor, Source(tensor))
    return found


def forget_kept(tensor: Tensor | None) -> None:
    """Take nothing for right any more that is kept of a tensor, if anything is."""
    found = None if tensor is None else _SOURCES.get(tensor)
    if found is not None:
        found.forget()
        if torch.__future__.get_swap_module_params_on_conversion():  # torch then refuses what is weakly referenced
            found.tensor = _gone
            _SOURCES.pop(tensor)


def _gone() -> None:
    return None


class Kept:
    """Blocks ``(blocks, b, count * b)`` of tensors, side by side, in the dtype of activations.

    New ones are new tensors: another thread, or a backward that is to come, may hold the old ones. Where a CUDA graph
    has been captured that reads them they are written into, since its replays go on reading there: after each step of
    an optimiser, and where `Source.forget` is called.
    """

    def __init__(self, sources: tuple[Source, ...], texts: tuple[str, ...], dtype: torch.dtype) -> None:
        self.sources, self.texts, self.dtype = sources, texts, dtype
        self._now: tuple[tuple[Any, ...], Tensor, _Filled | None] | None = None

    def read(self, tensors: Sequence[Tensor], states: tuple[Any, ...], *, apart: bool = False) -> Tensor:
        """The blocks that the tensors make, whose states are given.

        Args:
            tensors: of the sources.
            states: theirs, and `steps`, from before this call.
            apart: whether memory that is kept must not come from where this thread has been told to allocate.
        """
        now = self._now  # read once: another thread may replace it
        if now is None or now[0] != states:
            if capturing():  # then making them is a part of the graph, and what it makes is the graph's memory
                return made(tensors, self.texts, self.dtype)
            now = self._fill(tensors, states, apart)
        elif capturing():
            _note_captured(self)
        elif now[2] is not None:
            now[2].wait(now[1])
        return now[1]

    def current(self, tensor: Tensor) -> Tensor | None:
        """The blocks of the only source, if nothing has changed; makes no key and nothing else."""
        now = self._now
        if now is None:
            return None
        (number, version, look, _), counted = now[0]
        source = self.sources[0]
        same = number == source._number and version == tensor._version and counted == steps()
        if not same or look != source._glimpse.at(tensor) or capturing():
            return None
        if now[2] is not None:
            now[2].wait(now[1])
        return now[1]

    def refill(self) -> None:
        """Write what is right now to where graphs read."""
        tensors = [t for t in (s.tensor() for s in self.sources) if t is not None and may_be_kept(t)]
        if len(tensors) == len(self.sources) and not capturing():
            self._fill(tensors, states_of(self.sources, tensors), False)

    def forget(self) -> None:
        """Drop what is kept."""
        if self in _CAPTURED:
            self.refill()
        else:
            self._now = None

    def _fill(self, tensors: Sequence[Tensor], states: tuple[Any, ...], apart: bool) -> Any:
        before = self._now

        def make() -> Tensor:
            # A tensor made under inference_mode could not be used by a later training forward.
            with torch.inference_mode(False), torch.no_grad():
                return made(tensors, self.texts, self.dtype)

        blocks = on_another_thread(make, tensors[0].device) if apart and tensors[0].is_cuda else make()
        if type(blocks) is not Tensor:  # fake or functional
            return states, blocks, None
        if before is not None and self in _CAPTURED and _is_like(before[1], blocks):
            with torch.inference_mode(False), torch.no_grad():
                blocks = before[1].copy_(blocks)
        now = self._now = states, blocks, _Filled(blocks.device) if blocks.is_cuda else None
        return now


def states_of(sources: Sequence[Source], tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What tells whether the blocks of tensors are still right."""
    return *(s.state(t) for s, t in zip(sources, tensors, strict=True)), steps()


def may_be_kept(tensor: Tensor) -> bool:
    """Whether a tensor is what it seems to be: neither fake, functional nor sharded, and with a version."""
    return type(tensor) in (nn.Parameter, Tensor) and not tensor.is_meta and not tensor.is_inference()


def made(tensors: Sequence[Tensor], texts: Sequence[str], dtype: torch.dtype) -> Tensor:
    """Blocks side by side, ``(blocks, b, count * b)``; contiguous.

    Args:
        tensors: skews; blocks where the text is empty.
        texts: a `Recipe` for each.
        dtype: of the result.
    """
    with without_autocast(tensors[0].device):
        if "" in texts:
            parts = [read_recipe(r)(t) if r else t for r, t in zip(texts, tensors, strict=True)]
        else:
            parts = blocks_by([read_recipe(r) for r in texts], tensors)
        parts = [p.to(dtype) for p in parts]
        return (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]).contiguous()


def on_another_thread(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """What ``make`` makes, on the stream of this thread but in the process's ordinary memory.

    Before it records a CUDA graph, torch runs a compiled model once with all that this thread allocates in memory that
    it takes for free afterwards; nothing may stay there.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run() -> Tensor:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


class _Filled:
    """When blocks were written, for the other streams of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._event = self._stream.record_event()

    def wait(self, blocks: Tensor) -> None:
        here = torch.cuda.current_stream(blocks.device)
        if here != self._stream:
            here.wait_event(self._event)
            blocks.record_stream(here)


_CAPTURED: weakref.WeakSet[Kept] = weakref.WeakSet()
_refilling: RemovableHandle | None = None


def _note_captured(kept: Kept) -> None:
    global _refilling
    with _LOCK:
        _CAPTURED.add(kept)
        if _refilling is None:
            _refilling = register_optimizer_step_post_hook(_refill)


def _refill(*_: Any) -> None:
    for kept in list(_CAPTURED):
        kept.refill()


def _is_like(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and a.dtype == b.dtype
