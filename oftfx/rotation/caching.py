"""When the blocks of a rotation may be kept from one forward to the next."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

# Optimisers that are fused or write through `.data` leave a parameter's version as it is, so their steps are counted.
_steps = 0
_counting: RemovableHandle | None = None
_LOCK = threading.Lock()


def steps() -> int:
    """How often any optimiser has stepped since the first rotation was made."""
    return _steps


def count_steps() -> None:
    """Count the steps of every optimiser in this process from now on; whoever makes a rotation asks for it."""
    global _counting
    if _counting is None:
        with _LOCK:
            if _counting is None:
                _counting = register_optimizer_step_post_hook(_count_step)


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


_caching: ContextVar[bool] = ContextVar("oftfx_rotation_caching", default=True)


@contextmanager
def no_cache() -> Iterator[None]:
    """Compute every rotation anew inside this context; a recorder must see the computation itself."""
    token = _caching.set(False)
    try:
        yield
    finally:
        _caching.reset(token)


def keeping() -> bool:
    """Whether results may be kept from one forward to the next, by who knows what a CUDA graph does (see `kept`)."""
    return not torch.compiler.is_compiling() and _caching.get() and not torch.jit.is_tracing()


def caching() -> bool:
    """The same by who does not: replays of a graph would read what was kept then, whatever has been learnt."""
    return keeping() and not capturing()


def capturing() -> bool:
    """Whether a CUDA graph is being captured, whose replays run the kernels of this run and no Python."""
    # Without a driver, a build for CUDA raises where it is asked for streams.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
