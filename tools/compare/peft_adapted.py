"""A model with adapters made from a PEFT configuration: in PEFT, and here. The two say the same in their own words."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn as nn

import oftfx
from tools.compare.peft_tables import Row, build, inputs


def output(model: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first tensor that a model returns."""
    with torch.no_grad():
        found = model(**given)
    return found if isinstance(found, torch.Tensor) else found[0]


class Adapted:
    """What both sides have in common."""

    name: str
    model: nn.Module

    def __init__(self, row: Row, adapter: str = "default", base: nn.Module | None = None, **changes: Any) -> None:
        self.row, self.given = row, inputs(row.model)
        self.make(build(row.model) if base is None else base, adapter, self.config(**changes))

    def make(self, base: nn.Module, adapter: str, config: Any) -> None:
        raise NotImplementedError

    def config(self, **changes: Any) -> Any:
        """A new one at every call: PEFT writes into what it is given."""
        fields = copy.deepcopy({**self.row.config, **changes})
        if not {"r", "oft_block_size"} & set(fields):
            fields["oft_block_size"] = 16
        return peft.OFTConfig(**fields)

    def output(self) -> torch.Tensor:
        return output(self.model, self.given)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def fill(self, adapter: str = "default", seed: int = 0) -> Adapted:
        """Random skews, and random changes to what trains whole."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.own(adapter):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return self


class Theirs(Adapted):
    """In PEFT."""

    name = "PEFT"

    def make(self, base, adapter, config):
        self.model = peft.get_peft_model(base, config, adapter_name=adapter).eval()

    def own(self, adapter):
        named = [(n, p) for n, p in self.model.named_parameters() if f".{adapter}." in n]
        return [p for n, p in sorted(named, key=lambda i: ("oft_" not in i[0], i[0].replace(adapter, "")))]

    def add(self, adapter, **changes):
        self.model.add_adapter(adapter, self.config(**changes))
        self.model.eval()

    def set(self, *adapters):
        self.model.base_model.set_adapter(list(adapters))

    def active(self):
        return list(self.model.active_adapters)

    def remove(self, adapter):
        self.model.delete_adapter(adapter)

    def disabled(self) -> AbstractContextManager[Any]:
        return self.model.disable_adapter()

    def folded(self):
        return copy.deepcopy(self.model).merge_and_unload()

    def fold_and_back(self):
        self.model.merge_adapter()
        self.model.unmerge_adapter()

    def save(self, path: Path, adapter: str = "default"):
        self.model.save_pretrained(path, selected_adapters=[adapter])
        return path if adapter == "default" else path / adapter

    def load(self, path: Path, trainable: bool = False):
        return peft.PeftModel.from_pretrained(build(self.row.model), path, is_trainable=trainable).eval()

    def rows(self, names):
        with torch.no_grad():
            found = self.model(**self.given, adapter_names=["__base__" if n is None else n for n in names])
        return found if isinstance(found, torch.Tensor) else found[0]


class Ours(Adapted):
    """Here."""

    name = "oftfx"

    def make(self, base, adapter, config):
        self.model = oftfx.transform(base, config, adapter=adapter).eval()

    def own(self, adapter):
        active = self.active()
        oftfx.set_adapter(self.model, adapter)  # what it trains whole has names only while it acts
        names = {id(p): n for n, p in self.model.named_parameters()}
        oftfx.set_adapter(self.model, active)
        found = oftfx.adapter_parameters(self.model, adapter)
        return sorted(found, key=lambda p: (".oft." not in names[id(p)], names[id(p)]))

    def add(self, adapter, **changes):
        oftfx.add_adapter(self.model, adapter, self.config(**changes))

    def set(self, *adapters):
        oftfx.set_adapter(self.model, adapters)

    def active(self):
        return list(oftfx.active_adapters(self.model))

    def remove(self, adapter):
        oftfx.remove_adapter(self.model, adapter)

    def disabled(self):
        return oftfx.disable_adapters(self.model)

    def folded(self):
        return oftfx.fold(self.model).model

    def fold_and_back(self):
        oftfx.unfold(oftfx.fold(self.model, inplace=True, undo=True))

    def save(self, path: Path, adapter: str = "default"):
        return oftfx.save_adapter(self.model, path, adapter=adapter)

    def load(self, path: Path, trainable: bool = False):
        return oftfx.load_adapter(build(self.row.model), path, trainable=trainable).eval()

    def rows(self, names):
        with oftfx.adapter_rows(self.model, names):
            return self.output()


OTHER = {Theirs: Ours, Ours: Theirs}
