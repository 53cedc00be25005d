"""The adapters of one model: which there are, which act, and what they train besides rotations."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.nn as nn

from oftfx.adapter.buffers import BufferVersions
from oftfx.errors import AdapterError
from oftfx.folding.note import fold_notes
from oftfx.model.given import check_given, check_own
from oftfx.model.index import ModelIndex
from oftfx.placement.encoder import unwatch_encoders, watch_encoders
from oftfx.placement.find import rotated_sites
from oftfx.planning.plans import Plan
from oftfx.rotation.module import Rotation

ATTRIBUTE = "_oftfx_adapters"


@dataclass(frozen=True)
class Adapter:
    """One adapter: its name, the plan that it was inserted by, and whether its parameters train when it acts."""

    name: str
    plan: Plan
    trainable: bool = True


class AdapterStore:
    """Lives on the root module of a transformed model and is copied and pickled with it.

    Attributes:
        adapters: by name, in the order they were added.
        active: names that act, in the order they act.
        originals: base parameters that some adapter has of its own, by name.
        trained: for each adapter, its own version of those: what it trains whole, and what its file brought.
        buffers: the same of buffers.
    """

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.active: tuple[str, ...] = ()
        self.originals: dict[str, nn.Parameter] = {}
        self.trained: dict[str, dict[str, nn.Parameter]] = {}
        self.buffers = BufferVersions()

    def freeze_base(self, index: ModelIndex) -> None:
        """Only rotations require gradients from here on."""
        for module in index.paths:
            for parameter in module._parameters.values() if not isinstance(module, Rotation) else ():
                if parameter is not None:
                    parameter.requires_grad_(False)

    def add(self, index: ModelIndex, adapter: Adapter) -> Adapter:
        """Enter an adapter whose rotations are in place; it does not act, so nothing of it requires gradients yet."""
        self.take_back(index.model)
        self.adapters[adapter.name] = adapter
        self.buffers.add(index, adapter.name, adapter.plan.train_buffers)
        base = {n: self.originals.get(n, p) for n, p in index.parameters.items()}
        wanted = {id(base[n]) for n in (*adapter.plan.train, *adapter.plan.brought)}
        copies: dict[int, nn.Parameter] = {}
        own: dict[str, nn.Parameter] = {}
        for name, parameter in base.items():  # every name of a tied parameter, so ties stay
            if id(parameter) in wanted:
                if id(parameter) not in copies:
                    copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                self.originals.setdefault(name, parameter)
                own[name] = copies[id(parameter)]
        self.trained[adapter.name] = own
        for rotation in self.rotations(index, adapter.name):
            rotation.skew.requires_grad_(False)
        return adapter

    def set_trainable(self, name: str, trainable: bool) -> None:
        """Remember whether the parameters of an adapter require gradients whenever it acts."""
        self.adapters[name] = replace(self.adapters[name], trainable=trainable)

    def follow(self, root: nn.Module, *names: str) -> None:
        """Let parameters of these adapters, or of all, require gradients just where their adapter acts and trains."""
        on = {name: self.adapters[name].trainable and name in self.active for name in names or self.adapters}
        found = [placement for _, placement in rotated_sites(root)]
        for placement in found:
            for name, rotation in placement.rotations.items():
                if name in on:
                    _require_grad(rotation.skew, on[name])
        for placement in found:  # some of which share a rotation
            for aware in placement.through.values():
                acts = aware.names == placement.active and all(self.adapters[n].trainable for n in aware.names)
                for parameter in aware.parameters():
                    _require_grad(parameter, acts)
                for name in aware.names if acts and not aware.turns else ():
                    _require_grad(placement.rotations[name].skew, False)
        for name in on:
            brought = {id(self.trained[name][n]) for n in self.adapters[name].plan.brought}
            for parameter in self.trained[name].values():
                _require_grad(parameter, on[name] and id(parameter) not in brought)

    def remove(self, root: nn.Module, name: str) -> None:
        """Forget an adapter whose rotations are gone."""
        self.activate(root, tuple(n for n in self.active if n != name))
        del self.adapters[name]
        del self.trained[name]
        self.buffers.remove(name)

    def forget_folded(self, root: nn.Module) -> None:
        """After a fold that ended half way: the sites that it has folded are the adapters' no more."""
        rotated = dict(rotated_sites(root))
        for name, adapter in self.adapters.items():
            left = tuple(e for e in adapter.plan if e.fqn in rotated and name in rotated[e.fqn].rotations)
            self.adapters[name] = replace(adapter, plan=replace(adapter.plan, entries=left))

    def activate(self, root: nn.Module, names: tuple[str, ...]) -> None:
        """Let exactly these adapters act, in this order. What requires gradients does not change, see `follow`."""
        self.take_back(root)
        for _, placement in rotated_sites(root):
            placement.active = tuple(n for n in names if n in placement.rotations)
        self.active = names
        for name in self.originals:
            new, live = self._mounted(name), _get(root, name)
            if new.dtype != live.dtype or new.device != live.device:
                # The model was moved or cast meanwhile, which only reaches what is mounted.
                new.data = new.data.to(live.device, live.dtype)
            _put(root, name, new)
        self.buffers.mount(root, names)

    def _mounted(self, name: str) -> nn.Parameter:
        """The version of a whole parameter that belongs in the model now."""
        owners = [n for n in self.active if name in self.trained.get(n, {})]
        return self.trained[owners[-1]][name] if owners else self.originals[name]

    def take_back(self, root: nn.Module) -> None:
        """Learn of objects that were replaced in the model (``load_state_dict(assign=True)``, FSDP, a forward)."""
        self.buffers.take_back(root, self.active)
        for name in self.originals:
            live, known = _get(root, name), self._mounted(name)
            if live is known:
                continue
            for versions in (self.originals, *self.trained.values()):
                for other, parameter in versions.items():
                    if parameter is known and (other == name or _get(root, other) is live):
                        versions[other] = live

    def own(self, name: str) -> set[str]:
        """Names of the parameters and buffers that an adapter has besides its rotations."""
        return {*self.trained[name], *self.buffers.own[name]}

    def parameters(self, names: tuple[str, ...]) -> list[nn.Parameter]:
        """What these adapters train whole, each parameter once."""
        return list({id(p): p for n in names for p in self.trained[n].values()}.values())

    def rotations(self, root: nn.Module | ModelIndex, name: str) -> list[Rotation]:
        """The distinct rotations of an adapter, in the order of its sites."""
        found: dict[int, Rotation] = {}
        for _, placement in rotated_sites(root):
            rotation = placement.rotations.get(name)
            if isinstance(rotation, Rotation):
                found.setdefault(id(rotation), rotation)
        return list(found.values())

    def together(self, names: Sequence[str]) -> tuple[str, ...]:
        """The names, if these adapters can act at once.

        Raises:
            AdapterError: a name that is not here or that is named twice, or adapters that train the same module whole,
                of which a model can only have one version.
        """
        self.require(*names)
        if len(set(names)) != len(names):
            raise AdapterError(f"an adapter is named twice in {list(names)}")
        owners: dict[str, str] = {}
        for name in names:
            for own in sorted(self.own(name)):
                if (other := owners.setdefault(own, name)) != name:
                    raise AdapterError(
                        f"adapters {other!r} and {name!r} cannot act at once: each has its own {own}, and the model "
                        "can have one. Name one of them"
                    )
        return tuple(names)

    def require(self, *names: str) -> None:
        """Raise `AdapterError` for a name that is not here."""
        for name in names:
            if name not in self.adapters:
                close = difflib.get_close_matches(name, self.adapters, 1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise AdapterError(f"no adapter {name!r}; the model has {', '.join(self.adapters) or 'none'}.{hint}")


def check_name(name: str) -> None:
    """Raise `AdapterError` for a name that cannot be part of a parameter's name."""
    reserved = hasattr(nn.Module(), str(name)) or str(name).startswith("frozen")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w-]*", name) or reserved:
        raise AdapterError(
            f"adapter name {name!r}: expected a letter or digit, then letters, digits, '_' and '-', not 'frozen...' "
            "and no attribute of nn.Module, because it becomes part of parameter names"
        )


_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, FSDP, ``torch.compile`` or a recorded graph; ``model`` itself where it is none of these.

    Raises:
        AdapterError: it is no model; see `check_given`.
    """
    check_given(model)
    while True:
        inner = model.__dict__.get("eager") or model._modules.get("_orig_mod")
        if inner is None and type(model).__name__ in _WRAPPERS:
            inner = model._modules.get("module")
        if inner is None:
            return model
        model = inner


def located(model: nn.Module) -> tuple[nn.Module, AdapterStore]:
    """The transformed module (``model``, or what it wraps) and its store.

    Raises:
        AdapterError: there is none; the message names a part of the model that has one.
    """
    root = unwrapped(model)
    store = root.__dict__.get(ATTRIBUTE)
    if isinstance(store, AdapterStore):
        return root, store
    if part := transformed_part(root):
        raise AdapterError(f"{type(root).__name__} has no adapters itself, but its part {part!r} has; pass that part")
    check_own(root)
    folded = [name for note in fold_notes(root) for name in note.get("adapters", ())]
    if folded:
        raise AdapterError(
            f"{type(root).__name__} has no adapters any more: {', '.join(dict.fromkeys(folded))} was folded into it "
            "already. oftfx.unfold(result) brings it back; or put another one in front of the folded weights"
        )
    raise AdapterError(
        f"{type(root).__name__} has no adapters; put rotations into it with oftfx.transform or oftfx.load_adapter"
    )


def transformed_part(model: nn.Module) -> str | None:
    """Path of a module inside ``model`` that was transformed on its own, or None."""
    return next((n for n, m in model.named_modules() if n and ATTRIBUTE in m.__dict__), None)


def check_no_part(model: nn.Module) -> None:
    """Raise `AdapterError` for a part of a transformed model, whose rotations are adapters of the whole."""
    if find_store(model) is None and (fqn := next((f for f, p in rotated_sites(model) if p.rotations), None)):
        raise AdapterError(
            f"{fqn} rotates already, by an adapter of the model that this {type(model).__name__} is a part of. Give "
            "the whole model to oftfx.add_adapter, with rules that name this part"
        )


def find_store(model: nn.Module) -> AdapterStore | None:
    """The store of a model, or None where it was never transformed."""
    store = unwrapped(model).__dict__.get(ATTRIBUTE)
    return store if isinstance(store, AdapterStore) else None


def store_of(model: nn.Module) -> AdapterStore:
    """The store of a model; made where there is none."""
    return find_store(model) or keep_store(model, AdapterStore())


def keep_store(model: nn.Module, store: AdapterStore) -> AdapterStore:
    """Make ``store`` the model's."""
    watch_encoders(model)
    model.__dict__[ATTRIBUTE] = store
    return store


def drop_store(model: nn.Module) -> None:
    """Make the model a plain one again; its rotations are gone already."""
    model.__dict__.pop(ATTRIBUTE, None)
    unwatch_encoders(model)


def _require_grad(parameter: nn.Parameter, on: bool) -> None:
    if parameter.requires_grad != on:  # what FSDP has made of a parameter cannot be asked even for what it has
        parameter.requires_grad_(on)


def _get(root: nn.Module, name: str) -> nn.Parameter:
    owner, _, leaf = name.rpartition(".")
    return root.get_submodule(owner)._parameters[leaf]  # type: ignore[return-value]


def _put(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    root.get_submodule(owner)._parameters[leaf] = parameter
