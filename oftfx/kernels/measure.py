"""Which of two ways of computing the same is faster on a device of CUDA."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from oftfx.errors import OftfxError, warn

ROUNDS, REPEATS = 5, 10

MARGIN = 0.95
"""Of the time of the first; what is no faster than a clock's own noise does not take its place."""

Shape = tuple[torch.Size, torch.dtype, bool]
"""Of an operand: its shape, its dtype, and whether it has a gradient."""


def is_faster(
    device: torch.device,
    first: Callable[..., Any],
    second: Callable[..., Any],
    on: Sequence[Shape],
    check: Callable[..., None] | None = None,
) -> bool:
    """Whether ``second`` is faster than ``first``, forward, and backward where an operand has a gradient.

    And whether it is right, see `check_rounding`, or by a ``check`` of the same arguments: a compiler may be wrong on a
    device that nobody has tried.

    Timed on the caller's stream, host and device together, in a thread of its own: there is neither autocast nor
    inference mode there, nor are there hooks on saved tensors (gradient checkpointing counts those) or modes that see
    operations. What fails is not faster, and a warning says why.
    """
    stream = torch.cuda.current_stream(device)
    found: list[bool | Exception] = []

    def compare() -> None:
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                numbers = torch.Generator(device).manual_seed(0)  # the user's own are left alone
                made = [torch.empty(s, dtype=d, device=device).normal_(generator=numbers) for s, d, _ in on]
                operands = [m.requires_grad_(g) for m, (_, _, g) in zip(made, on, strict=True)]
                (check or check_rounding)(first, second, operands)
                found.append(_compare(first, second, operands))
        except Exception as error:  # no compiler, a device it does not know, memory, a wrong result
            found.append(error)

    thread = threading.Thread(target=compare, name="oftfx-measure")
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        warn(f"Triton's operators are not used for one kind of operands ({type(found[0]).__name__}: {found[0]})")
        return False
    return found[0]


def check_rounding(first: Callable[..., Any], second: Callable[..., Any], operands: Sequence[Tensor]) -> None:
    """Hold the second way against the first one in float64.

    Raises:
        OftfxError: it misses that by more than four times what the first misses in the dtype of the operands.
    """
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in operands]
    for exact, one, other in zip(*(run(first, wide), run(first, operands), run(second, operands)), strict=True):
        size, usual, missed = (float(torch.linalg.vector_norm(t.double())) for t in (exact, one - exact, other - exact))
        if not missed <= 4 * usual + 1e-6 * size:  # nor NaN
            raise OftfxError(
                f"its result is wrong here, off by {missed / size:.1e} where torch's is by {usual / size:.1e}"
            )


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
