"""Tell adapters apart by their numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.contents import adapter_tensors
from oftfx.adapter.store import located
from oftfx.planning.plans import Plan
from oftfx.rotation.module import whole


def fingerprint(model: nn.Module, adapter: str = "default") -> str:
    """SHA-256 of what decides the meaning of an adapter: its tensors, and how rotations are made of them.

    What the adapter is called does not count.

    Raises:
        AdapterError: no adapter of that name.
    """
    root, store = located(model)
    store.require(adapter)
    return fingerprint_of(store.adapters[adapter].plan, adapter_tensors(root, store, adapter))


def fingerprint_of(plan: Plan, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The same for tensors by their file keys, as they are in a model."""
    digest = hashlib.sha256()
    for entry in sorted(plan, key=lambda e: e.fqn):
        spec = entry.spec
        meaning = (spec.parameterization, spec.terms, spec.block_share, spec.coft_eps)
        digest.update(f"{entry.fqn} {meaning}\n".encode())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(whole(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
