"""Tell adapters apart by their numbers."""

from __future__ import annotations

import hashlib

import torch
import torch.nn as nn

from oftfx.adapter.contents import adapter_tensors
from oftfx.adapter.store import located
from oftfx.rotation.module import whole


def fingerprint(model: nn.Module, adapter: str = "default") -> str:
    """SHA-256 of what decides the meaning of an adapter: its tensors, and how rotations are made of them.

    What the adapter is called does not count.

    Raises:
        AdapterError: no adapter of that name.
    """
    root, store = located(model)
    store.require(adapter)
    digest = hashlib.sha256()
    for entry in sorted(store.adapters[adapter].plan, key=lambda e: e.fqn):
        spec = entry.spec
        meaning = (spec.parameterization, spec.terms, spec.block_share, spec.coft_eps)
        digest.update(f"{entry.fqn} {meaning}\n".encode())
    for name, tensor in sorted(adapter_tensors(root, store, adapter), key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(whole(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
