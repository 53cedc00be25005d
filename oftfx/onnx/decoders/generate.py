"""Greedy decoding with a graph of `export_onnx(..., cache=True)`, in ONNX Runtime and numpy alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oftfx.errors import ExportError
from oftfx.serving.copied.runtime.contract import ATTENTION

_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


def greedy(
    session: Any,
    input_ids: Any,
    steps: int,
    *,
    attention_mask: Any = None,
    inputs: Mapping[str, Any] | None = None,
    run_options: Any = None,
) -> Any:
    """Read a prompt in one run, then add ``steps`` tokens, each the likeliest, in one run each.

    Args:
        session: an ``onnxruntime.InferenceSession``.
        input_ids: int64 ``(batch, sequence)``.
        steps: how many tokens to add; nothing stops earlier.
        attention_mask: int64 ``(batch, sequence)``, 0 at padding, which is on the left or on the right of a row; on the
            right only where the graph's attention is one operator (``fused``). All ones if left out.
        inputs: what the graph takes besides, such as ``adapter_index`` or the blocks of an adapter.
        run_options: ``onnxruntime.RunOptions``, for instance with an active adapter.

    Returns:
        int64 ``(batch, steps)``: the new tokens.

    Raises:
        ExportError: the graph has no cache, or attention that takes no padding on the left.
    """
    import numpy as np

    ids = np.asarray(input_ids, dtype=np.int64)
    mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, dtype=np.int64)
    if not mask[:, 0].all() and ATTENTION in session.get_modelmeta().custom_metadata_map:
        raise ExportError(
            "attention_mask: a row is padded on the left, and the graph's attention takes a row's tokens to be its "
            "first; pad on the right, or export with fused=False"
        )
    takes = {i.name: i for i in session.get_inputs()}
    past = {
        name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), _DTYPES[value.type])
        for name, value in takes.items()
        if name.startswith("past_key_values.")
    }
    if not past:
        raise ExportError("the graph takes no past_key_values; export it with cache=True")
    names = [o.name for o in session.get_outputs()]
    found = []
    last = ids.shape[1] - 1 - mask[:, ::-1].argmax(1)
    for _ in range(steps):
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        tokens = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feed = {**{n: v for n, v in tokens.items() if n in takes}, **past, **(inputs or {})}
        result = dict(zip(names, session.run(names, feed, run_options), strict=True))
        ids = result["logits"][np.arange(len(ids)), last].argmax(-1)[:, None]
        last = np.zeros_like(last)
        found.append(ids)
        mask = np.concatenate([mask, np.ones_like(ids)], 1)
        past = {n: result[n.replace("past_key_values", "present", 1)] for n in past}
    return np.concatenate(found, 1) if found else ids[:, :0]
