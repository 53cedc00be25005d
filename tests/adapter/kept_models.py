"""Models with 4-bit integers and rotations in front of them."""

import copy

import torch

import oftfx
from oftfx import OFT
from tests.formats.compressed_model import write_compressed
from tests.reference import randomize

SHARED = {
    "*.[qkv]_proj": OFT(16, block_share=True, share_input=True),
    "*.o_proj": OFT(32, block_share=True),
    "*.gate_proj": OFT(32, block_share=True, share_input=True),
    "*.up_proj": OFT(32, block_share=True, share_input=True),
    "*.down_proj": OFT(16),
}
"""What vLLM's transforms can do: one rotation for the layers that it joins, one block, or a small matrix."""


def compressed_base(model, folder):
    """A float model's linear layers as compressed-tensors' int4 in groups of 32, float16, as it is loaded."""
    from transformers import AutoModelForCausalLM

    write_compressed(model.half(), folder / "base", num_bits=4, group_size=32)
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float16).eval()


def in_float32(model):
    """A copy that computes in float32 with the same weights; transformers' own ``float`` refuses quantized models."""
    return torch.nn.Module.float(copy.deepcopy(model))


def kept(base, rules, std=0.1):
    """A fold that leaves the rotations in front of the codes."""
    model = base if rules is None else oftfx.transform(base, rules)
    return oftfx.fold(randomize(model, std=std).eval(), quantized="keep")
