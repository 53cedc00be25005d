"""Which operator is used: torch's own, or Triton's where that is faster.

`OFTFX_TRITON` in the environment, read when oftfx is loaded:

* ``auto``, and where it is not set: on CUDA both are timed at the first use of a kind, once a process, and the faster
  one is kept. A kind is a device, dtypes, sizes and numbers of blocks and outputs, which operands have gradients, and
  the number of rows to a power of two. Nothing is timed while a graph is captured or compiled; what is compiled, for
  any number of rows, takes Triton's where it was the faster one at all numbers that were timed before. The two differ
  by rounding, so the last bits of a result may hang on a timing; ``torch.use_deterministic_algorithms(True)`` and
  either of the other settings keep them from it.
* ``0``: torch's own, always.
* ``1``: Triton's, untimed, wherever it can; with ``TRITON_INTERPRET=1`` also on a CPU, for tests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from oftfx.kernels.measure import is_faster
from oftfx.kernels.setting import THERE, on_cpu, setting, wanted
from oftfx.rotation.autocast import product_dtype
from oftfx.rotation.caching import capturing
from oftfx.rotation.skew import skew_size

SETTING = setting()

LARGEST_COUNT = 8
"""Outputs of one product; each is a stretch of code of its own in the kernel."""

LARGEST_SERIES = 32
"""Of a larger block, the products in float32 do not fit in registers (seen in what ptxas says of 64)."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_CPU = on_cpu(SETTING)
_THERE = THERE
_DECIDED: dict[tuple[Any, ...], bool] = {}
_ALWAYS: dict[tuple[Any, ...], bool] = {}
_LOCK = threading.Lock()


def possible(x: Tensor) -> bool:
    """Whether there is anything to ask here; the rest of a model's life on a CPU costs this much."""
    return x.is_cuda or (_CPU and x.device.type == "cpu")


def rotates(x: Tensor, blocks: Tensor, in_torch: Callable[[Tensor, Tensor], Any]) -> bool:
    """Whether Triton's operator makes ``x @ blockdiag(R_i)``; shapes as in `rotate_jointly`, which torch's is."""
    if not (_can(x) and _can(blocks)):  # first: to a tracer of torch.jit, sizes are tensors
        return False
    groups, size, width = blocks.shape
    fits = size > 1 and x.shape[-1] == groups * size and width <= LARGEST_COUNT * size
    if not fits or x.device != blocks.device:
        return False
    kind = "rotate", product_dtype(x), blocks.dtype, groups, size, width
    return _chosen(kind, x.numel() // (groups * size), in_torch, _jointly, (x, blocks))


def makes_series(skew: Tensor, size: int, double: int, single: bool, in_torch: Callable[[Tensor], Tensor]) -> bool:
    """Whether Triton's operator makes ``I + 2Q + ... + 2Q^double (+ Q^(double+1))``; shapes as in `cayley`."""
    if double < 1 or not 1 < size <= LARGEST_SERIES or skew.dtype != torch.float32 or not _can(skew):
        return False
    if skew.dim() != 2 or skew.shape[1] != skew_size(size):
        return False

    def by_triton(skew: Tensor) -> Tensor:
        from oftfx.rotation.triton.cayley import cayley_series

        return cayley_series(skew, size, double, single)

    return _chosen(("series", size, double, single), skew.shape[0], in_torch, by_triton, (skew,))


def _jointly(x: Tensor, blocks: Tensor) -> tuple[Tensor, ...]:
    from oftfx.rotation.triton.rotate import rotate_jointly

    return rotate_jointly(x, blocks)


def _chosen(
    kind: tuple[Any, ...],
    rows: int,
    in_torch: Callable[..., Any],
    by_triton: Callable[..., Any],
    operands: tuple[Tensor, ...],
) -> bool:
    if SETTING != "auto":
        return wanted(SETTING, _THERE)
    if torch.are_deterministic_algorithms_enabled():
        return False
    learns = [torch.is_grad_enabled() and t.requires_grad for t in operands]
    key = (operands[0].device, *kind, *learns)
    if torch.compiler.is_compiling():
        return _ALWAYS.get(key, False)
    whole = (*key, rows.bit_length())
    found = _DECIDED.get(whole)
    return _decide(key, whole, in_torch, by_triton, operands, learns) if found is None else found


def _decide(
    key: tuple[Any, ...],
    whole: tuple[Any, ...],
    in_torch: Callable[..., Any],
    by_triton: Callable[..., Any],
    operands: tuple[Tensor, ...],
    learns: list[bool],
) -> bool:
    if capturing():
        return False
    with _LOCK:  # whoever comes meanwhile waits for the answer
        if whole not in _DECIDED:
            dtypes = [product_dtype(operands[0]), *(t.dtype for t in operands[1:])]
            on = [(t.shape, d, g) for t, d, g in zip(operands, dtypes, learns, strict=True)]
            _DECIDED[whole] = _THERE and is_faster(operands[0].device, in_torch, by_triton, on)
            _ALWAYS[key] = _ALWAYS.get(key, True) and _DECIDED[whole]
        return _DECIDED[whole]


def _can(tensor: Tensor) -> bool:
    """Whether an operator of ours stands for torch's here: not for what records, transforms or wraps tensors."""
    if tensor.dtype not in DTYPES or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    if torch.compiler.is_compiling():  # what is exported holds torch's operators only
        return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
    transforms = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return not (transforms or torch.jit.is_tracing())
