"""The two sides of tools/compare/compare_peft.py: what a comparison does, in PEFT's words and in ours."""

import copy

import peft
import torch
from peft.tuners.oft.layer import OFTLayer, OFTRotationModule

import oftfx
import oftfx.rotation.recipe
from oftfx.formats.registry import format_of


class Peft:
    """PEFT's side: what a comparison does, in PEFT's words."""

    name, transforms = "PEFT", (OFTRotationModule, "_cayley_batch")

    def __init__(self, case, base=None):
        self.case = case
        self.config = {"target_modules": [case.target], "oft_block_size": 4, **case.config}
        base = copy.deepcopy(case.build() if base is None else base)
        self.model = peft.get_peft_model(base, peft.OFTConfig(**self.config)).eval()

    def skews(self, adapter="default"):
        return [p for n, p in self.model.named_parameters() if "oft_" in n and f".{adapter}." in n]

    def add(self, adapter):
        self.model.add_adapter(adapter, peft.OFTConfig(**self.config))

    def activate(self, *adapters):
        self.model.base_model.set_adapter(list(adapters))

    def folded(self):
        return copy.deepcopy(self.model).merge_and_unload()

    def fold(self):
        self.model.merge_adapter()

    def unfold(self):
        self.model.unmerge_adapter()

    def layer(self):
        return self.model.get_submodule(f"base_model.model.{self.case.target}").get_base_layer()

    def scale(self, factor):
        for module in self.model.modules():
            if isinstance(module, OFTLayer):
                module.scale_layer(factor)

    def save(self, path):
        self.model.save_pretrained(path)

    def load(self, path):
        return peft.PeftModel.from_pretrained(self.case.build(), path).eval()

    def export(self, path, inputs):
        torch.onnx.export(self.model, inputs, str(path), dynamo=True, verbose=False)


class Oftfx:
    """Our side, in our words."""

    name, transforms = "oftfx", (oftfx.rotation.recipe, "cayley")

    def __init__(self, case, base=None):
        self.case = case
        self.model = oftfx.transform(case.build() if base is None else base, {case.target: case.spec}).eval()

    def skews(self, adapter="default"):
        return oftfx.adapter_parameters(self.model, adapter)

    def add(self, adapter):
        oftfx.add_adapter(self.model, adapter, {self.case.target: self.case.spec})

    def activate(self, *adapters):
        oftfx.set_adapter(self.model, adapters)

    def folded(self):
        return oftfx.fold(self.model).model

    def fold(self):
        lossy = any((found := format_of(m)) is not None and not found.lossless for m in self.model.modules())
        self.result = oftfx.fold(self.model, quantized="requantize" if lossy else None, inplace=True, undo=True)

    def unfold(self):
        oftfx.unfold(self.result)

    def layer(self):
        return self.model.get_submodule(self.case.target)

    def scale(self, factor):
        with torch.no_grad():
            for skew in self.skews():
                skew.mul_(factor)

    def save(self, path):
        oftfx.save_adapter(self.model, path)

    def load(self, path):
        return oftfx.load_adapter(self.case.build(), path).eval()

    def export(self, path, inputs):
        oftfx.export_onnx(self.model, path, inputs)


SIDES = (Peft, Oftfx)
OTHER = {Peft: Oftfx, Oftfx: Peft}


def attempt(function, *arguments):
    """The figure, or the class of the exception it ended in."""
    try:
        return function(*arguments)
    except Exception as error:
        return type(error).__name__


@torch.no_grad()
def fill(side, *adapters, std=0.1):
    """The same random skews on both sides, wherever their shapes agree."""
    for seed, adapter in enumerate(adapters or ("default",)):
        for skew in side.skews(adapter):
            skew.copy_(torch.randn(skew.shape, generator=torch.Generator().manual_seed(seed)) * std)
