"""Safetensors files whose bytes are decided by what is in them."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import Tensor


def packed(tensors: dict[str, Tensor], notes: Mapping[str, str]) -> bytes:
    """A file of contiguous CPU tensors; the package itself writes the metadata in an order that changes by chance."""
    from safetensors.torch import save

    data = save(tensors, metadata=dict(notes))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[end:]
