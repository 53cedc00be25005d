"""What a recording runs instead of the model, so that the model and whoever else uses it notice nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn

from oftfx.errors import OftfxError, UnrecordableError
from oftfx.formats.exact import use_exact
from oftfx.formats.registry import format_of
from oftfx.model.compressed import keep_compressed
from oftfx.model.structure import HOOKS, structural_copy, tensors_in
from oftfx.placement.find import rotated_sites


class StandIn:
    """A copy of a model over the same tensors that a recording may do anything to.

    Its forward may set attributes (a mask made on first use would be a fake tensor) and hooks; quantized weights stay
    as they are stored.

    Args:
        model: the model.
        real: for real values: in eval mode.
        training: the mode, where it is not the model's.
        bare: without adapters.

    Attributes:
        model: the model.
        module: the copy.
        formats: of its layers.

    Raises:
        UnrecordableError: the model has something in it that cannot be copied.
    """

    def __init__(self, model: nn.Module, *, real: bool, training: bool | None, bare: bool) -> None:
        self.model = model
        self._became: dict[int, Any] = {}
        try:
            self.module = structural_copy(model, self._became)
        except OftfxError as error:
            raise UnrecordableError(
                f"a recording runs a copy of the model, and {type(model).__name__} cannot be copied: {error.__cause__}."
                " Remove that attribute meanwhile"
            ) from error
        modules = set(self.module.modules())
        if kept := next((n for n, m in model.named_modules() if m in modules), None):
            raise UnrecordableError(
                f"a recording runs a copy of the model, where {kept or type(model).__name__} is still the same object. "
                "Let its __deepcopy__ make a new module"
            )
        for module in modules:
            inner = module._modules.get("_orig_mod")  # of torch.compile, which would compile the recorder as well
            if inner is not None:
                vars(module)["forward"] = inner
        keep_compressed(self.module, strict=False)
        self.formats = {m: f for m in modules if (f := format_of(m)) is not None}
        for module, weight_format in self.formats.items():
            weight_format.hold_still(module)
            if weight_format.native_fault(module) is not None:
                use_exact(module)
        if bare:
            for _, placement in rotated_sites(self.module):
                placement.active = ()
        if training is not None:
            self.module.train(training)
        if real:
            self.module.eval()

    def dissolve(self) -> None:
        """Take the copy apart: its layers and their hooks know each other, and would keep the weights for a while."""
        for module in list(self.module.modules()):
            module._modules.clear()
            for name in HOOKS:
                getattr(module, name).clear()

    def original(self, tensor: torch.Tensor) -> torch.Tensor:
        """The model's own tensor that one of the copy stands for; any other one as it is."""
        if type(tensor) is not nn.Parameter:
            return tensor
        found = (t for m in self.model.modules() for t in tensors_in(vars(m), set()))
        return next((t for t in found if self._became.get(id(t)) is tensor), tensor)


@contextmanager
def random_state(model: nn.Module) -> Iterator[None]:
    """Leave the random numbers of the model's devices as they were.

    Torch has one generator a device for all threads. What another thread draws meanwhile is drawn a second time
    afterwards, so this is for real values only: fake tensors draw nothing.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng([d.index for d in devices]):
        yield
