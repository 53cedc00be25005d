"""A small attention network of quantized layers, and its state byte by byte."""

from __future__ import annotations

import torch

import oftfx
from oftfx import OFT
from oftfx.formats.registry import format_of, formats
from tests.ecosystem.network import Network
from tests.formats.scalar_checks import same_bytes
from tests.reference import dense_rotation, randomize

WIDTH = 64
NAMES = [f"blocks.{i}.{n}" for i in range(2) for n in ("q", "k", "v", "o", "up")]
"""The rotated layers, in the order in which they run."""


def quantize(linear, kind="bnb4"):
    """A layer of one of the formats, with the weights of a float one."""
    if kind == "bnb4":
        from oftfx.formats.bnb4 import make_linear4bit

        return make_linear4bit(linear)
    weight_format = formats()[kind]
    layer = weight_format.make_tiny(linear.in_features, linear.out_features)
    weight_format.write(layer, weight_format.requantize(linear.weight.detach(), layer))
    layer.bias.data.copy_(linear.bias.data)
    return layer


def original():
    """The float network, before it was quantized."""
    torch.manual_seed(5)
    return Network(WIDTH)


def network(kind="bnb4"):
    """Its layers in the blocks quantized, the head in floats."""
    base = original()
    for block in base.blocks:
        for name, layer in list(block.named_children()):
            setattr(block, name, quantize(layer, kind))
    return base


def rotated(share=False, kind="bnb4", std=0.05):
    """With random rotations in front of the quantized layers."""
    spec = {"blocks.*": OFT(16, share_input=share)}
    return randomize(oftfx.transform(network(kind), spec, example_inputs=(torch.randn(2, 3, WIDTH),)), std=std)


def inputs(count=3, length=40, seed=0):
    """Batches of different lengths; their channels depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(99)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) @ torch.diag(torch.logspace(0, -1.5, WIDTH)) / WIDTH**0.5
    mix = 3 * (mix + 0.1 * torch.eye(WIDTH))
    generator.manual_seed(seed)
    return [(torch.randn(2, length + 7 * i, WIDTH, generator=generator) @ mix,) for i in range(count)]


def weight(model, name):
    """The values a layer stores now."""
    layer = model.get_submodule(name)
    return format_of(layer).dequantize(layer)


def rotations(model):
    """Dense rotations of all sites, by path; float64."""
    return {
        e.fqn: dense_rotation(model.get_parameter(f"{e.owner}.oft.default.skew"), e.block_size, e.blocks)
        for e in oftfx.adapters(model)["default"]
    }


def tensors_of(value):
    """All tensors in what a format reads, also of tensor subclasses and of objects that hold some."""
    if isinstance(value, torch.Tensor):
        held = [t for v in vars(value).values() if hasattr(v, "absmax") for t in tensors_of(vars(v))]
        if hasattr(value, "__tensor_flatten__"):
            return [t for name in value.__tensor_flatten__()[0] for t in tensors_of(getattr(value, name))]
        return [value.detach().as_subclass(torch.Tensor), *held]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_of(item)]
    return tensors_of(vars(value)) if hasattr(value, "absmax") else []


def bytes_of(state):
    """Dtype, shape and a copy of the bytes of each of its tensors."""
    found = [t.contiguous() for t in tensors_of(state)]
    return [(t.dtype, tuple(t.shape), t.reshape(-1).view(torch.uint8).clone()) for t in found]


def stored(model):
    """Class and bytes of every layer's weight, and the other tensors."""
    found = {}
    for name, module in model.named_modules():
        weight_format = format_of(module)
        if weight_format is not None:
            found[name] = (type(module), bytes_of(dict(weight_format.read(module))))
    return found


def assert_same(got, wanted, names=None):
    """That two states are byte for byte the same (at ``names``)."""
    assert list(got) == list(wanted)
    for name in wanted if names is None else names:
        assert got[name][0] is wanted[name][0], name
        assert same_bytes(got[name][1], wanted[name][1]), name


def hooks(model):
    """How many hooks each module has."""
    return {n: len(m._forward_pre_hooks) + len(m._forward_hooks) for n, m in model.named_modules()}


def run(model, batches):
    """Outputs of all batches in one tensor."""
    with torch.no_grad():
        return torch.cat([model(*b).flatten() for b in batches])
