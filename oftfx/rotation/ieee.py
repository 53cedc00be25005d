"""Products of float32 in float32, also where torch was told that less is enough (TF32, bfloat16)."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch


def ieee_products() -> AbstractContextManager[Any]:
    """Float32 products as IEEE has them, inside; what was chosen before comes back.

    TF32 has 11 bits: a rotation made so is 1e-3 from one, and a fold would not be the model that was trained. The
    choice is torch's for the whole process, so other threads multiply exactly as well meanwhile. What is compiled is
    left as it is.
    """
    return nullcontext() if torch.compiler.is_compiling() or _is_exact() else _IEEE


class _Ieee(AbstractContextManager[None]):
    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: tuple[str | None, dict[str, str]] = (None, {})

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = _chosen(), {n: b.fp32_precision for n, b in _backends().items()}
                _choose(None if self._before[0] is None else "highest", dict.fromkeys(_backends(), "ieee"))
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                _choose(*self._before)


_IEEE = _Ieee()


def _is_exact() -> bool:
    """Whether the user has chosen exact products, so that nobody brings others back meanwhile."""
    with _IEEE._lock:  # what another thread has just chosen inside is not the user's
        if _IEEE._inside:
            return False
        fine = ("ieee", "none")
        return _chosen() == "highest" and all(b.fp32_precision in fine for b in _backends().values())


def _chosen() -> str | None:
    """By torch's older function; None where it was chosen by the newer attributes, which it then refuses to say."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _choose(word: str | None, each: dict[str, str]) -> None:
    if word is not None:
        torch.set_float32_matmul_precision(word)
    for name, backend in _backends().items():
        if backend.fp32_precision != each[name]:
            backend.fp32_precision = each[name]


def _backends() -> dict[str, Any]:
    """Where torch 2.9 and newer keep it."""
    found = {"cuda": torch.backends.cuda.matmul, "mkldnn": getattr(torch.backends.mkldnn, "matmul", None)}
    return {n: b for n, b in found.items() if hasattr(b, "fp32_precision")}
