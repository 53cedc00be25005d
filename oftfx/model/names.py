"""Paths of sites, and what the children are called that hold their rotations."""

from __future__ import annotations

import re

CHILD = "oft"
"""Name of the child module of a layer that holds its rotations; see `child_name`."""


def child_name(parameter: str) -> str:
    """``"oft"`` for the weight of a layer, ``"oft_<name>"`` for any other parameter of a module."""
    return CHILD if parameter == "weight" else f"{CHILD}_{parameter}"


def read_as(name: str) -> str:
    """Name by which code reads a parameter: ``"a.w"`` for what ``"a.parametrizations.w.original"`` is computed from."""
    return _COMPUTED.sub(r"\1\2", name)


_COMPUTED = re.compile(r"(^|.*\.)parametrizations\.([^.]+)\.original$")


def join(module: str, parameter: str) -> str:
    """Path of a site: the layer's for its ``weight``, else the parameter's."""
    if parameter == "weight" and module:
        return module
    return f"{module}.{parameter}" if module else parameter
