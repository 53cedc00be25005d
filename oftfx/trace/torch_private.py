"""What recording uses of torch that has no public name: the one place to mend when torch moves.

Fake tensors and symbolic sizes take a second to import, so they are imported where they are used.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
import torch.nn as nn
import torch.utils.checkpoint
from torch.utils import _pytree as pytree

__all__ = ["CALL", "SWITCH", "pytree"]  # the rest is defined here

CALL = "_call_impl"
"""What ``nn.Module.__call__`` looks up on the instance and calls, so that an attribute of this name intercepts it."""


SWITCH = torch._C._set_grad_enabled
"""What ``torch.no_grad`` and its like call."""


def call_of(module: nn.Module) -> Any:
    """The implementation of a call that a module has from its class."""
    return getattr(type(module), CALL).__get__(module)


def without_modes() -> AbstractContextManager[Any]:
    """Code of ours that reads tensors while a recording runs: their attributes do not go through its mode."""
    return torch._C.DisableTorchFunction()


def device_of(tensor: torch.Tensor) -> torch.device:
    """As ``tensor.device``, which of a fake tensor is a dispatch."""
    return getattr(tensor, "fake_device", None) or tensor.device


def switches_gradients(function: Any) -> bool:
    """Whether a torch function is the one behind ``torch.no_grad`` and its like."""
    return function is SWITCH


def inside_functorch(value: Any) -> bool:
    """Whether a value belongs to a transformation (``vmap``, ``grad``) that runs now."""
    return isinstance(value, torch.Tensor) and torch._C._functorch.maybe_get_level(value) > 0


def in_checkpoint() -> bool:
    """Whether reentrant checkpointing switches gradients on or off right now, around the code that it runs."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_WAY_TO_CHECKPOINT):
        if frame is None:
            return False
        if frame.f_code is torch.utils.checkpoint.CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


@contextmanager
def through_checkpoints() -> Iterator[None]:
    """Let reentrant checkpoints call their function directly, in this thread; they are as always in the others."""
    token = _DIRECTLY.set(True)
    _change_checkpoints(1)
    try:
        yield
    finally:
        _change_checkpoints(-1)
        _DIRECTLY.reset(token)


_DIRECTLY: ContextVar[bool] = ContextVar("oftfx_through_checkpoints", default=False)
_LOCK = threading.Lock()
_open = 0
_original: Any = None  # of the class itself; its base class has one too


def _change_checkpoints(by: int) -> None:
    """One more `through_checkpoints`, or one less: the first puts a function in place that the last takes away."""
    global _open, _original
    checkpoint: Any = torch.utils.checkpoint.CheckpointFunction
    with _LOCK:
        if not _open:
            _original, always = vars(checkpoint).get("apply"), checkpoint.apply
            checkpoint.apply = staticmethod(
                lambda run, preserve, *args: run(*args) if _DIRECTLY.get() else always(run, preserve, *args)
            )
        _open += by
        if not _open and _original is not None:
            checkpoint.apply = _original
        elif not _open:
            del checkpoint.apply


_WAY_TO_CHECKPOINT = 8  # frames: ours, then __enter__ or __exit__ of no_grad and what they call


@contextmanager
def fake_tensors(values: list[Any], *, dynamic: bool) -> Iterator[tuple[Any, list[Any]]]:
    """Fake tensors inside; gives the environment of symbolic sizes and ``values`` with every tensor replaced.

    Args:
        values: anything with tensors in it.
        dynamic: keep their sizes symbolic.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    count = iter(range(1_000_000))

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        # Sizes 0 and 1 are special to broadcasting, so they always stay fixed.
        sizes = [DimDynamic.DYNAMIC if dynamic and s > 1 else DimDynamic.STATIC for s in tensor.shape]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(tensor, source=_source(next(count)), symbolic_context=context)

    replaced = [pytree.tree_map_only(torch.Tensor, fake, v) for v in values]
    # Without the dispatcher, padding and interpolation fix the batch and the length; with it, every call is slower.
    with mode, enable_python_dispatcher() if dynamic else nullcontext():
        yield mode.shape_env, replaced


class FakeTensors:
    """Makes fake tensors of the mode that is active now, without asking torch what they are like.

    Attributes:
        kind: their class.
    """

    def __init__(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
        from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

        self.kind = FakeTensor
        self._mode = next(m for m in reversed(_get_current_dispatch_mode_stack()) if isinstance(m, FakeTensorMode))

    def new(self, element: torch.Tensor, device: torch.device) -> torch.Tensor:
        """One like a tensor on the meta device."""
        return self.kind(self._mode, element, device)

    def plain(self, tensor: Any) -> bool:
        """Whether shape, strides, dtype, device and gradients are all there is to a fake tensor."""
        return (
            tensor.constant is None
            and tensor.fake_mode is self._mode
            and tensor.layout is torch.strided
            and not tensor.dtype.is_complex  # may be lazily conjugated
            and not tensor._has_symbolic_sizes_strides
        )

    @staticmethod
    def none() -> AbstractContextManager[Any]:
        """Tensors made inside are not fake."""
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        return unset_fake_temporarily()


def kernels_allowed() -> tuple[bool, ...]:
    """Which implementations of attention torch may choose between, which decides the strides of the result."""
    return (
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
    )


def is_fake(value: torch.Tensor) -> bool:
    """Whether a tensor has no numbers."""
    return hasattr(value, "fake_mode")


def size_conditions(shape_env: Any, tensors: list[torch.Tensor]) -> str:
    """What a recording relied on about the sizes of `fake_tensors`, as an expression for `sizes_hold`."""
    found = shape_env.produce_guards(tensors, [_source(i) for i in range(len(tensors))], ignore_static=False)
    # Strides and offsets of an input do not change what the recorded functions compute.
    return " and ".join(g for g in found if ".stride()" not in g and ".storage_offset()" not in g)


def size_name(index: int) -> str:
    """How an expression names a tensor."""
    return f"L['t{index}']"


def sizes_hold(expression: str, tensors: list[Any]) -> bool:
    """Evaluate an expression of `size_conditions`; never text from a file."""
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

    return bool(eval(expression, dict(SYMPY_INTERP), {"L": {f"t{i}": t for i, t in enumerate(tensors)}}))


def computed(expression: Any, symbols: dict[Any, Any]) -> Any:
    """A symbolic expression computed by Python's operators on what stands for its symbols."""
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    return sympy_interp(PythonReferenceAnalysis, symbols, expression)


def _source(index: int) -> Any:
    from torch._dynamo.source import LocalSource

    return LocalSource(f"t{index}")
