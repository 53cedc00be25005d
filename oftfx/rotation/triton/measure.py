"""Which of two ways of computing the same is faster on a device of CUDA."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from oftfx.errors import warn

ROUNDS, REPEATS = 5, 10

MARGIN = 0.95
"""Of the time of the first; what is no faster than a clock's own noise does not take its place."""

Shape = tuple[torch.Size, torch.dtype, bool]
"""Of an operand: its shape, its dtype, and whether it has a gradient."""


def is_faster(device: torch.device, first: Callable[..., Any], second: Callable[..., Any], on: Sequence[Shape]) -> bool:
    """Whether ``second`` is faster than ``first`` on zeros, forward, and backward where an operand has a gradient.

    Timed on the caller's stream, host and device together, in a thread of its own: there is neither autocast nor
    inference mode there, nor are there hooks on saved tensors (gradient checkpointing counts those) or modes that see
    operations. What fails is not faster, and a warning says why.
    """
    stream = torch.cuda.current_stream(device)
    found: list[bool | Exception] = []

    def compare() -> None:
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                operands = [torch.zeros(s, dtype=d, device=device, requires_grad=g) for s, d, g in on]
                found.append(_compare(first, second, operands))
        except (
            Exception
        ) as error:  # a compiler that is missing, a device it does not know, memory: torch's own is there
            found.append(error)

    thread = threading.Thread(target=compare, name="oftfx-measure")
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        warn(f"Triton's operators are not used for one kind of rotation ({type(found[0]).__name__}: {found[0]})")
        return False
    return found[0]


def _compare(first: Callable[..., Any], second: Callable[..., Any], operands: list[Tensor]) -> bool:
    each = first, second
    best = [float("inf")] * 2
    for turn in range(1 + ROUNDS):
        for i, function in enumerate(each):
            seconds = _seconds(function, operands)
            if turn:  # the first one compiles, and fills the allocator
                best[i] = min(best[i], seconds)
    return best[1] < MARGIN * best[0]


def _seconds(function: Callable[..., Any], operands: list[Tensor]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(REPEATS):
        run(function, operands)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def run(function: Callable[..., Any], operands: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a function, or the gradients of their sum where an operand has one."""
    outputs = function(*operands)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    learns = [t for t in operands if t.requires_grad]
    return list(torch.autograd.grad(outputs, learns, [torch.ones_like(o) for o in outputs])) if learns else outputs
