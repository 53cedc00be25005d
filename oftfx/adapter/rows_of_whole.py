"""Rows with adapters of their own where modules train whole: each group of rows runs through its adapter's version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn as nn
from torch import Tensor

from oftfx.adapter.store import AdapterStore
from oftfx.errors import AdapterError, warn
from oftfx.model.structure import HOOKS, twin
from oftfx.placement.find import rotated_sites
from oftfx.placement.rows import Chain, Rows, by_group, check_eager, is_innermost


class WholeModule:
    """A module that some of the adapters train whole, in one `oftfx.adapter_rows`.

    Its versions are shells of their own over the tensors of an adapter or of the base, so nothing in the model changes,
    for this thread or another.

    Args:
        path: of the module.
        module: itself.
        rows: of the batch.
        owners: for each row, the adapter whose version it runs through; None for the base's.
        mounted: whose version is in the model.
        version: makes what runs for an owner.
    """

    def __init__(
        self,
        path: str,
        module: nn.Module,
        rows: Rows,
        owners: Sequence[str | None],
        mounted: str | None,
        version: Callable[[str | None], nn.Module],
    ) -> None:
        self.path, self.module, self.rows = path, module, rows
        self.owners, self.mounted, self.version = tuple(owners), mounted, version
        self.ran = False

    @property
    def matters(self) -> bool:
        """Whether what is in the model is not right for all rows."""
        return set(self.owners) != {self.mounted}

    def before(self, module: nn.Module, _args: tuple[Any, ...]) -> None:
        """Forward pre-hook: refuse what would be written before the output is there."""
        if is_innermost(self.rows) and module.training and any(True for _ in module.buffers()):
            self._refuse("in training it also writes statistics of its batch")

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """Forward hook: the output with the rows of each group as their version makes them."""
        if not is_innermost(self.rows):
            return None
        self.ran = True
        check_eager(self.path)
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            self._refuse("it is called with more than one tensor, or returns something else than a tensor")
        if {args[0].shape[:1], output.shape[:1]} != {(len(self.owners),)}:
            self._refuse(f"it reads {tuple(args[0].shape)} and returns {tuple(output.shape)}")
        groups: dict[str | None, list[int]] = {}
        for row, owner in enumerate(self.owners):
            groups.setdefault(owner, []).append(row)
        return by_group(groups, args[0], lambda part, owner: self.version(owner)(part))

    def _refuse(self, why: str) -> None:
        raise AdapterError(
            f"{self.path} trains whole in an adapter that adapter_rows names, and has to read {len(self.owners)} rows "
            f"in dimension 0, one tensor in, one out: {why}. Use one adapter a call"
        )


@contextmanager
def with_whole(root: nn.Module, store: AdapterStore, rows: Rows, chains: Sequence[Chain]) -> Iterator[None]:
    """Run modules that train whole group by group, in the calls inside, in this thread.

    Raises:
        AdapterError: an adapter has something of its own that is in no module which can be run for some rows.
    """
    found = [w for w in _whole_modules(root, store, rows, chains) if w.matters]
    handles = [w.module.register_forward_hook(w, with_kwargs=True) for w in found]
    handles += [w.module.register_forward_pre_hook(w.before) for w in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if rows.ran or any(w.ran for w in found):
        for whole in found:
            if not whole.ran:
                warn(
                    f"adapter_rows: {whole.path} trains whole in an adapter that was named, and was not called; if "
                    "another module reads its weight, all rows had the model's version"
                )


def _whole_modules(root: nn.Module, store: AdapterStore, rows: Rows, chains: Sequence[Chain]) -> list[WholeModule]:
    names = tuple(dict.fromkeys(n for chain in (*chains, store.active) for n in chain))
    paths: dict[str, None] = {}
    for name in names:
        whole = store.adapters[name].plan.train_modules
        paths.update(dict.fromkeys(whole))
        if left := sorted(n for n in store.own(name) if not any(n.startswith(f"{path}.") for path in whole)):
            named = any(name in chain for chain in chains)
            raise AdapterError(
                f"adapter_rows: adapter {name!r} has its own {left[0]}"
                + (f" and {len(left) - 1} more" if left[1:] else "")
                + ", of which a batch can only have one version; use one adapter a call"
                + ("" if named else ", or set_adapter(model, None) first")
            )
    return [_whole_module(root, store, rows, chains, path) for path in paths]


def _whole_module(root: nn.Module, store: AdapterStore, rows: Rows, chains: Sequence[Chain], path: str) -> WholeModule:
    module = root.get_submodule(path)
    inside = set(module.modules())
    if rotated := next((site for site, p in rotated_sites(root) if p.module in inside), None):
        raise AdapterError(
            f"adapter_rows: one adapter trains {path} whole and another rotates {rotated} in it; use one adapter a call"
        )
    if type(module).forward is nn.Module.forward:
        raise AdapterError(f"adapter_rows: {path} trains whole and is called in parts; use one adapter a call")

    def owner(chain: Chain) -> str | None:
        return next((n for n in chain if any(o.startswith(f"{path}.") for o in store.own(n))), None)

    owners = [owner(chain) for chain in chains]
    return WholeModule(path, module, rows, owners, owner(store.active), lambda o: _version(module, path, store, o))


def _version(module: nn.Module, path: str, store: AdapterStore, owner: str | None) -> nn.Module:
    """The module with the tensors of an adapter, or of the base, and without the hooks of `WholeModule`."""
    parameters = {**store.originals, **(store.trained[owner] if owner is not None else {})}
    buffers = {**store.buffers.originals, **(store.buffers.own[owner] if owner is not None else {})}
    result = twin(module)
    for name, part in result.named_modules(prefix=path):
        for kind, known in (("_parameters", parameters), ("_buffers", buffers)):
            live = vars(part)[kind]
            vars(part)[kind] = {n: known.get(f"{name}.{n}", tensor) for n, tensor in live.items()}
        for hooks in HOOKS:
            registered = vars(part)[hooks]
            for key in [k for k, h in registered.items() if isinstance(getattr(h, "__self__", h), WholeModule)]:
                del registered[key]
    return result
