"""HRA of PEFT: a product of reflections, ``hra_u (n, r)``.

``W' = W H_1 ... H_r`` with ``H_i = I - 2 u_i u_i^T`` of normalised columns, or, with ``apply_GS``, of columns made
orthogonal, ``W' = W (I - 2 U U^T)``. The product is made one block of the size of the input; where it has an eigenvalue
near -1, which any odd number of reflections gives, signs on the weight's columns go with it.

Verified against peft 0.21.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oftfx.adapter.conventions.base import Contents, Foreign, Target, Turn
from oftfx.adapter.conventions.orthogonal import turn_of
from oftfx.adapter.conventions.peft_config import by_layer, checked_config, read_others
from oftfx.adapter.conventions.source import Source
from oftfx.adapter.peft_files import PREFIX
from oftfx.errors import AdapterFileError
from oftfx.model.site import Site

VECTORS = ".hra_u"


class HRA(Foreign):
    """Of PEFT."""

    name = "peft-hra"
    made_by = "PEFT"
    is_directory = True
    read_only = "a rotation needs as many reflections as it has dimensions"

    def recognizes(self, source: Source) -> bool:
        """By its key."""
        return any(k.startswith(PREFIX) and k.endswith(VECTORS) for k in source.heads)

    def read(self, source: Source, target: Target) -> Contents:
        """One rotation for the reflections of a layer."""
        config = checked_config(source, "HRA")
        layers, others = by_layer(source, target, (VECTORS,))
        orthogonal = config.get("apply_GS") is True
        turns = {f: self._turn(source, k[VECTORS], target.sites[f], orthogonal) for f, k in layers.items()}
        return Contents(turns, read_others(source, others), config)

    def _turn(self, source: Source, key: str, site: Site, orthogonal: bool) -> Turn:
        shape = source.heads[key].shape
        if len(shape) != 2 or shape[0] != site.in_features or not shape[1]:
            raise AdapterFileError(
                f"{source.named(key)} has shape {shape}; {site.fqn} needs ({site.in_features}, r). Is it an adapter of "
                "another model?"
            )
        u = source.wide(key)
        if not bool((u.norm(dim=0) > 0).all()):
            raise AdapterFileError(f"{source.named(key)} has a column of zeros, which reflects in no direction")
        return turn_of(_product(u, orthogonal).T[None], source.named(key))


def _product(u: Tensor, orthogonal: bool) -> Tensor:
    if orthogonal:  # the signs of QR's columns do not count
        columns = torch.linalg.qr(u).Q
        return torch.eye(len(u), dtype=u.dtype) - 2 * columns @ columns.T
    product = torch.eye(len(u), dtype=u.dtype)
    for column in (u / u.norm(dim=0)).T:
        product -= 2 * torch.outer(product @ column, column)
    return product
