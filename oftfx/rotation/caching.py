"""When the blocks of a rotation may be kept from one forward to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

# Optimisers that are fused or write through `.data` leave a parameter's version as it is, so their steps are counted.
_steps = 0


def steps() -> int:
    """How often any optimiser has stepped since the first rotation was made."""
    return _steps


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)

_caching: ContextVar[bool] = ContextVar("oftfx_rotation_caching", default=True)


@contextmanager
def no_cache() -> Iterator[None]:
    """Compute every rotation anew inside this context; a recorder must see the computation itself."""
    token = _caching.set(False)
    try:
        yield
    finally:
        _caching.reset(token)


def caching() -> bool:
    """Whether results may be kept from one forward to the next."""
    return not torch.compiler.is_compiling() and _caching.get()
