"""Tell whether the models of several processes are the same to the bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FoldError
from oftfx.folding.peers import Peers
from oftfx.formats.sharded import is_sharded

APART = (
    "They have computed different numbers from the same. Let all of them run on machines and devices of one kind with "
    "one number of threads (OMP_NUM_THREADS), or fold in one process"
)


def check_model(model: nn.Module, peers: Peers, remedy: str) -> None:
    """See that every process has the same whole model.

    Raises:
        FoldError: it has not; the message names a tensor that differs, and ends with the remedy.
    """
    if peers.world == 1:
        return
    kinds = {c.__name__ for m in model.modules() for c in type(m).__mro__}
    shards = [name for name, p in model.named_parameters() if is_sharded(p)]
    if shards or kinds & {"FSDPModule", "FullyShardedDataParallel"}:
        raise FoldError(
            f"distributed=True: {shards[0] if shards else 'the model'} is sharded, and every process has to hold the "
            "whole model, plain or in DDP: its forwards wait for inputs at different layers"
        )
    peers.check_same("model", digests(model), remedy)


def digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 of every tensor of a model by its name, also of those that it does not save."""
    values: dict[str, Any] = {**dict(model.named_buffers()), **model.state_dict()}
    return {name: digest(value) for name, value in values.items()}


def digest(value: Any) -> str:
    """Of one tensor: dtype, shape and bytes."""
    found = hashlib.sha256()
    for part in _plain(value) if isinstance(value, Tensor) else ():
        found.update(f"{part.dtype} {tuple(part.shape)} ".encode())
        if part.is_meta:  # accelerate has offloaded it; a site's is refused by the fold
            continue
        found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if not isinstance(value, Tensor):
        found.update(repr(value).encode())
    return found.hexdigest()[:32]


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor of a package's own class is made of."""
    inner: Any = tensor
    if not hasattr(inner, "__tensor_flatten__") or type(tensor) in (Tensor, nn.Parameter):
        yield tensor
        return
    for name in inner.__tensor_flatten__()[0]:
        yield from _plain(getattr(inner, name))
