"""One batch, an adapter for each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.nn as nn

from oftfx.adapter.rows_of_whole import with_whole
from oftfx.adapter.store import AdapterStore
from oftfx.adapter.switch import switchable
from oftfx.errors import AdapterError
from oftfx.placement.find import rotated_sites
from oftfx.placement.rows import Chain, Rows, with_rows
from oftfx.placement.torch_private import is_compiled

BASE = "__base__"
"""PEFT's word for a row without adapter; None means the same."""


@contextmanager
def adapter_rows(model: nn.Module, names: Sequence[str | Sequence[str] | None]) -> Iterator[None]:
    """Let each row of a batch have an adapter of its own, inside a ``with``: ``y[i] = layer(x[i] @ R_names[i])``.

    Rows of one adapter are rotated together; rows without one are what the base model makes of them. Gradients reach
    each adapter from its rows, where its parameters require any: ``set_adapter(model, ["a", "b"])`` lets both train.
    Which adapters act outside, in other threads and in copies of the model does not change.

    Args:
        model: a transformed model.
        names: for each row an adapter, several that act in a row, or None (or ``"__base__"``) for the base model.
            Dimension 0 of what every rotated layer reads has to be these rows; a decoder's search with beams has a row
            a beam. The parts of an encoder-decoder then read different numbers of rows, which is refused.

    Raises:
        AdapterError: an unknown name, an adapter that also trains biases, a compiled model; and, in a forward, a layer
            that reads the rows in another shape, a weight that a larger module reads by itself, gradient checkpointing,
            compilation, export or tracing.

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")}, adapter="news")
        >>> x = torch.ones(2, 6)
        >>> with oftfx.adapter_rows(model, ["news", None]):
        ...     y = model(x)
        >>> torch.allclose(y[0], model(x)[0]), torch.equal(y[1], base(x)[1])
        (True, True)
    """
    root, store = switchable(model)
    if isinstance(names, str) or not names:
        raise AdapterError(f"adapter_rows: got {names!r}, expected a list with an adapter (or None) for each row")
    chains = [_chain(store, name) for name in names]
    _check_runs_as_it_is(model)
    store.take_back(root)
    rows = Rows([p for _, p in rotated_sites(root)], chains)
    with with_whole(root, store, rows, chains), with_rows(rows):
        yield


def _chain(store: AdapterStore, name: str | Sequence[str] | None) -> Chain:
    if name is None or name == BASE:
        return ()
    return store.together((name,) if isinstance(name, str) else tuple(name))


def _check_runs_as_it_is(model: nn.Module) -> None:
    for path, module in model.named_modules():
        where = path or type(module).__name__
        if type(module).__name__ == "DataParallel":
            raise AdapterError(
                f"adapter_rows: {where} runs its model in threads of its own, with a part of the rows each; use the "
                "model inside, or DistributedDataParallel"
            )
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None or is_compiled(module.forward):
            raise AdapterError(
                f"adapter_rows: {where} is compiled, and which adapter a row has is no part of a program; use the "
                "model that was given to torch.compile"
            )
