"""The adapters of one model: which there are, which act, and what they train besides rotations."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

import torch.nn as nn

from oftfx.errors import AdapterError
from oftfx.hooks import rotated_sites
from oftfx.plans import Plan
from oftfx.rotation.module import Rotation

ATTRIBUTE = "_oftfx_adapters"


@dataclass(frozen=True)
class Adapter:
    """One adapter: its name and the plan that it was inserted by."""

    name: str
    plan: Plan


class AdapterStore:
    """Lives on the root module of a transformed model and is copied and pickled with it.

    Attributes:
        adapters: by name, in the order they were added.
        active: names that act, in the order they act.
        originals: base parameters that some adapter trains whole, by name.
        trained: for each adapter, its own version of those.
    """

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.active: tuple[str, ...] = ()
        self.originals: dict[str, nn.Parameter] = {}
        self.trained: dict[str, dict[str, nn.Parameter]] = {}

    def freeze_base(self, root: nn.Module) -> None:
        """Only rotations require gradients from here on."""
        rotations = {id(p) for m in root.modules() if isinstance(m, Rotation) for p in m.parameters()}
        for parameter in root.parameters():
            if id(parameter) not in rotations:
                parameter.requires_grad_(False)

    def add(self, root: nn.Module, adapter: Adapter, *, trainable: bool) -> Adapter:
        """Enter an adapter whose rotations are in place."""
        self.adapters[adapter.name] = adapter
        own: dict[str, nn.Parameter] = {}
        copies: dict[int, nn.Parameter] = {}  # tied names stay tied
        for name in adapter.plan.train:
            base = self.originals.setdefault(name, _get(root, name))
            if id(base) not in copies:
                copies[id(base)] = nn.Parameter(base.detach().clone(), requires_grad=trainable)
            own[name] = copies[id(base)]
        for name, parameter in list(root.named_parameters(remove_duplicate=False)):
            if id(parameter) in copies and name not in own:
                self.originals.setdefault(name, parameter)
                own[name] = copies[id(parameter)]
        self.trained[adapter.name] = own
        for rotation in self.rotations(root, adapter.name):
            rotation.skew.requires_grad_(trainable)
        return adapter

    def remove(self, root: nn.Module, name: str) -> None:
        """Forget an adapter whose rotations are gone."""
        self.activate(root, tuple(n for n in self.active if n != name))
        del self.adapters[name]
        del self.trained[name]

    def activate(self, root: nn.Module, names: tuple[str, ...]) -> None:
        """Let exactly these adapters act, in this order; of parameters trained whole, the last named one's count."""
        for _, _, hook in rotated_sites(root):
            hook.active = tuple(n for n in names if n in hook.rotations)
        for parameter_name, original in self.originals.items():
            owners = [n for n in names if parameter_name in self.trained[n]]
            _put(root, parameter_name, self.trained[owners[-1]][parameter_name] if owners else original)
        self.active = names

    def rotations(self, root: nn.Module, name: str) -> list[Rotation]:
        """The distinct rotations of an adapter, in the order of its sites."""
        found: dict[int, Rotation] = {}
        for _, _, hook in rotated_sites(root):
            rotation = hook.rotations.get(name)
            if isinstance(rotation, Rotation):
                found.setdefault(id(rotation), rotation)
        return list(found.values())

    def require(self, *names: str) -> None:
        """Raise `AdapterError` for a name that is not here."""
        for name in names:
            if name not in self.adapters:
                close = difflib.get_close_matches(name, self.adapters, 1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise AdapterError(f"no adapter {name!r}; the model has {', '.join(self.adapters) or 'none'}.{hint}")


def check_name(name: str) -> None:
    """Raise `AdapterError` for a name that cannot be part of a parameter's name."""
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"\w[\w-]*", name)
        or hasattr(nn.Module, name)
        or name == "training"
    ):
        raise AdapterError(
            f"adapter name {name!r}: expected letters, digits, '_' and '-', and no attribute of nn.Module, because it "
            "becomes part of parameter names"
        )


def located(model: nn.Module) -> tuple[nn.Module, AdapterStore]:
    """The transformed module in ``model`` (itself, or inside DDP, ``torch.compile`` or the like) and its store.

    Raises:
        AdapterError: there is none.
    """
    # A recorded graph (ProgramGraph) leaves its adapters with the model it was recorded from.
    for module in model.__dict__.get("eager", model).modules():
        store = module.__dict__.get(ATTRIBUTE)
        if isinstance(store, AdapterStore):
            return module, store
    raise AdapterError(
        f"{type(model).__name__} has no adapters; put rotations into it with oftfx.transform or oftfx.load_adapter"
    )


def find_store(model: nn.Module) -> AdapterStore | None:
    """The store of a model, or None where it was never transformed."""
    try:
        return located(model)[1]
    except AdapterError:
        return None


def store_of(model: nn.Module) -> AdapterStore:
    """The store of a model; made where there is none."""
    store = find_store(model)
    if store is None:
        store = AdapterStore()
        model.__dict__[ATTRIBUTE] = store
    return store


def drop_store(model: nn.Module) -> None:
    """Make the model a plain one again; its rotations are gone already."""
    model.__dict__.pop(ATTRIBUTE, None)


def _get(root: nn.Module, name: str) -> nn.Parameter:
    owner, _, leaf = name.rpartition(".")
    return root.get_submodule(owner)._parameters[leaf]  # type: ignore[return-value]


def _put(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    root.get_submodule(owner)._parameters[leaf] = parameter
