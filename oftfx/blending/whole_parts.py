"""Blend what adapters have besides rotations: ``base + sum_i w_i (own_i - base)``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from oftfx.adapter.store import AdapterStore
from oftfx.errors import AdapterError
from oftfx.precision import pieces


@torch.no_grad()
def blend_whole(store: AdapterStore, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Parameters and buffers by name; an adapter without a version of its own has the base's.

    Raises:
        AdapterError: a buffer that none has below zero would get there (a variance).
    """
    result = {}
    for name, base in store.originals.items():
        versions = {n: store.trained[n][name].to(base.device) for n in weights if name in store.trained[n]}
        if versions:
            result[name] = _blended(base, versions, weights)
    for name, base in store.buffers.originals.items():
        own = {n: store.buffers.own[n][name].to(base.device) for n in weights if name in store.buffers.own[n]}
        if own:
            result[name] = made = _blended(base, own, weights)
            if all(bool((t >= 0).all()) for t in (base, *own.values())) and not bool((made >= 0).all()):
                raise AdapterError(
                    f"{name} would get negative by weights {dict(weights)}, and no adapter's is: statistics of a "
                    "normalization do not go that far. Use weights between 0 and 1 that add up to 1 at most"
                )
    return result


def _blended(base: Tensor, versions: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """In float64, rounded once; counts to the nearest integer. A part whose weight is 1 comes out bit for bit."""
    result = torch.empty_like(base)
    for out, old, *own in pieces(result, base.detach(), *(v.detach() for v in versions.values())):
        total = (1 - sum(weights[name] for name in versions)) * old.double()
        for name, version in zip(versions, own, strict=True):
            total += weights[name] * version.double()
        out.copy_(total if base.is_floating_point() else total.round())
    return result
