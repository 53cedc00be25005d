"""Find the weights of a model that can be rotated, in its module tree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn

from oftfx.errors import RuleError
from oftfx.formats.base import WeightFormat
from oftfx.formats.bnb4_experts import Bnb4Experts
from oftfx.formats.by_name import class_named
from oftfx.formats.dense import DenseParameter
from oftfx.formats.layout import Layout
from oftfx.formats.parametrized import parametrization_of
from oftfx.formats.registry import format_of
from oftfx.formats.sharded import WHOLE, cut_of
from oftfx.model.index import ModelIndex
from oftfx.model.names import join
from oftfx.model.site import Site
from oftfx.model.structure import is_own_module
from oftfx.rotation.accelerate import runs_on
from oftfx.rotation.spec import OFT

EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
_KERNEL_EXPERTS = {
    ("finegrained_fp8", "FP8Experts"): "FineGrainedFP8Config",
    ("mxfp4", "Mxfp4GptOssExperts"): "Mxfp4Config",
}
"""Experts whose forward hands codes to a kernel, by file and class, and the config that loads them as floats."""


class Finder:
    """Finds sites in an indexed model."""

    def __init__(self, index: ModelIndex) -> None:
        self.index = index
        self.head = output_head(index.model)
        self.refused: dict[str, str] = {}

    def site(
        self, module: nn.Module, weight_format: WeightFormat, parameter: str = "weight", reader: str | None = None
    ) -> Site:
        """The site of one weight."""
        shape = weight_format.geometry(module)
        weight = module._parameters.get(parameter)
        path, *others = self.index.paths[module]
        own = {f"{p}.{parameter}" if p else parameter for p in self.index.paths[module]}
        tied = tuple(n for n in self.index.names.get(id(weight), ()) if n not in own) if weight is not None else ()
        whole = parameter == "weight" and path != ""
        names = [p if whole else f"{p}.{parameter}" if p else parameter for p in (path, *others)]
        # Naming a module reaches the parameters that it uses by itself.
        holders = () if whole else tuple(p for p in (path, *others) if p)
        return Site(
            fqn=names[0],
            kind=shape.kind,
            format=weight_format.name,
            module_class=type(module).__name__,
            in_features=shape.in_features,
            out_features=shape.out_features,
            dtype=str(weight_format.dtype(module)).removeprefix("torch."),
            tied=tied,
            aliases=(*names[1:], *holders),
            is_head=module is self.head,
            parameter=parameter,
            reader=reader,
            layout=weight_format.layout(module),
            placements=shape.placements,
            experts=shape.experts,
        )

    def layers(self) -> Iterator[Site]:
        """Every site that the module tree alone shows, in its order, each once."""
        for module, (path, *_) in self.index.paths.items():
            if is_own_module(module):
                continue
            weight_format = self.index.format_of(module)
            if path and (cut := cut_of(module)):
                self.refused[path] = f"{cut}. {WHOLE}"
            elif isinstance(module, nn.Embedding) and module.sparse:
                self.refused[path] = (
                    "an embedding with sparse=True: gradients of a rotation are dense. Make it dense first "
                    f"(model.get_submodule({path!r}).sparse = False)"
                )
            elif weight_format is not None and path and (reason := weight_format.refuses(module)):
                self.refused[path] = reason
            elif weight_format is not None and path:
                yield self.site(module, weight_format)
            elif isinstance(module, nn.MultiheadAttention):
                yield from self._attention(module, path)
            elif is_experts(module):
                yield from self._experts(module)
            elif config := next((c for names, c in _KERNEL_EXPERTS.items() if class_named(module, *names)), None):
                for name in EXPERT_PARAMETERS:
                    self.refused[join(path, name)] = (
                        f"a kernel multiplies by the codes of these {type(module).__name__}, so nothing can turn what "
                        "it reads; load the model with its experts as floats: "
                        f"from_pretrained(..., quantization_config={config}(dequantize=True))"
                    )

    def _attention(self, module: nn.MultiheadAttention, path: str) -> Iterator[Site]:
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            found = DenseParameter(name, Layout(), "linear")
            if found.matches(module):
                yield self.site(module, found, name)
        out = module.out_proj
        found = DenseParameter("weight", Layout(), "linear")
        if self.index.format_of(out) is None and found.matches(out):
            yield self.site(out, found, reader=path)

    def _experts(self, module: nn.Module) -> Iterator[Site]:
        layout = Layout("experts_columns" if module.is_transposed else "experts")
        for name in EXPERT_PARAMETERS:
            # The first product reads the module's own input, which is much cheaper to rotate than all experts.
            placements = ("weight",) if name == "down_proj" else ("activation", "weight")
            quantized = Bnb4Experts(name, layout, "experts", placements)
            if quantized.matches(module) and (reason := quantized.refuses(module)):
                self.refused[join(self.index.paths[module][0], name)] = reason
                continue
            if quantized.matches(module):
                yield self.site(module, quantized, name)
                continue
            found = DenseParameter(name, layout, "experts", placements)
            if found.matches(module) and module._parameters[name].dim() == 3:  # type: ignore[union-attr]
                yield self.site(module, found, name)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the experts of a layer as transformers 5 does: 3-D tensors, with flags."""
    if not (hasattr(module, "is_transposed") and hasattr(module, "has_gate")):
        return False
    # Not by `hasattr`, which would compute a parameter that a parametrization computes.
    return "down_proj" in module._parameters or parametrization_of(module, "down_proj") is not None


def format_at(module: nn.Module, site: Site, *, each: bool = False) -> WeightFormat:
    """The format that reads the weight of a site in ``module``; ``each``: with one rotation for every expert."""
    found = format_of(module) if site.is_layer else None
    if found is not None:
        return found
    options = site.parameter, site.layout.with_each(each), site.kind, site.placements
    quantized = Bnb4Experts(*options)
    return quantized if quantized.matches(module) else DenseParameter(*options)


def choose_placement(site: Site, spec: OFT) -> str:
    """Where the rotation of a site acts.

    Raises:
        RuleError: the spec asks for a place that this kind of site does not have.
    """
    possible = site.placements
    if spec.experts == "each" and site.experts:
        possible = ("weight",)  # which expert reads a row is decided inside
    if spec.placement == "auto":
        return possible[0]
    if spec.placement not in possible:
        raise RuleError(
            f"{site.fqn}: placement {spec.placement!r} is not possible for this {site.module_class} ({site.kind}); "
            f"possible: {', '.join(possible)}. Leave it 'auto'"
        )
    return spec.placement


def fits(model: nn.Module, site: Site) -> bool:
    """Whether a raw parameter of a saved plan is there, in the same shape."""
    try:
        module = model.get_submodule(site.module)
        _ = model.get_submodule(site.reader or "")
    except AttributeError:
        return False
    found = format_at(module, site)
    if not found.matches(module):
        return False
    shape = found.geometry(module)
    return (shape.in_features, shape.out_features, shape.experts) == (site.in_features, site.out_features, site.experts)


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that a transformers model names as its output embedding."""
    getter: Any = getattr(model, "get_output_embeddings", None)
    try:
        return getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):  # models without a head
        return None


def weight_device(module: nn.Module) -> torch.device:
    """Where a layer runs: where accelerate brings its inputs, else the device of its first parameter or buffer."""
    if (device := runs_on(module)) is not None:
        return device
    for group in (module._parameters, module._buffers):
        for tensor in group.values():
            if tensor is not None:
                return tensor.device
    return torch.device("cpu")
