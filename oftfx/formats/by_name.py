"""Whose class a layer has, told by names: the packages themselves are never imported."""

from __future__ import annotations

from functools import lru_cache

import torch.nn as nn


def class_named(module: nn.Module, package: str, *names: str) -> type | None:
    """The first class of a layer's kind with one of these names, of a package; None where there is none.

    Args:
        module: the layer.
        package: a part of the name of the file that defines the class.
        names: of the class; any where none is given.
    """
    return _found(type(module), package, names)  # type: ignore[arg-type]  # mypy: a type is hashable


@lru_cache(maxsize=4096)  # every format is asked for every module of a model
def _found(kind: type, package: str, names: tuple[str, ...]) -> type | None:
    return next((c for c in kind.__mro__ if package in c.__module__ and (not names or c.__name__ in names)), None)
