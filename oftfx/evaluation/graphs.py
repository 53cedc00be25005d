"""Logits of an ONNX file, also of one that takes the cache of a decoder, or an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oftfx.errors import ExportError, MissingExtraError
from oftfx.onnx.checks.verify import open_session
from oftfx.serving.copied.runtime.contract import ADAPTER_INDEX, ADAPTERS, INTERFACE, MODE
from oftfx.serving.copied.runtime.errors import ServingError

_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64}


def graph_logits(path: Path, adapter: Path | None = None) -> Callable[[Tensor], Tensor]:
    """Logits ``(batch, n, vocabulary)`` of token ids ``(batch, n)``, read at once from an empty cache.

    Args:
        path: a causal language model of `oftfx.export_onnx`.
        adapter: for a swappable file, an ``.onnx_adapter`` that acts.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        ExportError: there is no such file, it does not load, takes what no text has, or the adapter is not for it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx", "Running an ONNX file") from error
    if not path.is_file():
        raise ExportError(f"there is no file {path}")
    session = open_session(path)
    notes = session.get_modelmeta().custom_metadata_map
    mode = notes.get(MODE, "fixed")
    if adapter is not None and mode != "swappable":
        raise ExportError(f"{path} is {mode}: only a swappable file takes an adapter beside it")
    options, kept = None, None
    if adapter is not None:
        from oftfx.serving.copied.runtime.adapters import read_adapter  # which imports onnxruntime

        blocks = {i.name: i for i in session.get_overridable_initializers()}
        try:
            kept = read_adapter(adapter, notes[INTERFACE], blocks)
        except ServingError as error:
            raise ExportError(f"{adapter}: {error}") from None
        options = onnxruntime.RunOptions()
        options.add_active_adapter(kept)
    takes = {i.name: i for i in session.get_inputs()}
    if "logits" not in {o.name for o in session.get_outputs()}:
        raise ExportError(f"{path} gives no 'logits'; it is no causal language model")
    chosen = 1 if mode == "mixed" and notes.get(ADAPTERS) else 0

    def logits(ids: Tensor) -> Tensor:
        feed: dict[str, Any] = {}
        for name, value in takes.items():
            if name == "input_ids":
                feed[name] = ids.numpy()
            elif name == "attention_mask":
                feed[name] = torch.ones_like(ids).numpy()
            elif name == "position_ids":
                feed[name] = torch.arange(ids.shape[1]).expand(ids.shape).contiguous().numpy()
            elif name.startswith("past_key_values."):
                empty = torch.zeros(len(ids), value.shape[1], 0, value.shape[3], dtype=_DTYPES[value.type])
                feed[name] = empty.numpy()
            elif name == ADAPTER_INDEX:
                feed[name] = torch.full((len(ids),), chosen).numpy()
            else:
                raise ExportError(f"{path} takes {name!r}, which no text has")
        assert kept is not None or adapter is None  # it lives as long as the session runs with it
        return torch.from_numpy(session.run(["logits"], feed, options)[0])

    return logits
