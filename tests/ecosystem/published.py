"""Readers of quantized checkpoints, each from the layout that its format has published; nothing of oftfx in them.

A reader takes the tensors of a file whose names begin with a layer's path, without that path, and the quantization
config; it returns the weight ``(out, in)``, float32.
"""

import json

import torch


def nibbles(words, axis):
    """Unsigned 4-bit numbers of int32 words, the lowest bits first, along an axis."""
    parts = torch.stack([(words.long() >> (4 * i)) & 15 for i in range(8)], dim=axis + 1 if axis >= 0 else axis)
    return parts.flatten(axis, axis + 1) if axis >= 0 else parts.flatten(axis - 1, axis)


def gptq(stored, config):
    """AutoGPTQ's: words run down the inputs, zeros along the outputs, less one unless the version is 2."""
    codes = nibbles(stored["qweight"], 0)
    zeros = nibbles(stored["qzeros"], 1) + (0 if config["checkpoint_format"] == "gptq_v2" else 1)
    group = stored["g_idx"].long()
    if config["sym"]:  # what servers take for granted
        zeros = torch.full_like(zeros, 8)
    if not config["desc_act"]:
        group = torch.arange(len(group)) // config["group_size"]
    return ((codes - zeros[group]).half() * stored["scales"][group]).float().T


def awq(stored, config):
    """AutoAWQ's GEMM: words along the outputs, their nibbles in the order 0 2 4 6 1 3 5 7."""

    def unpacked(words):
        back = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
        return nibbles(words, 1).view(len(words), -1, 8)[..., back].flatten(1)

    group = torch.arange(len(stored["qweight"])) // config["group_size"]
    codes, zeros = unpacked(stored["qweight"]), unpacked(stored["qzeros"])
    return ((codes - zeros[group]).half() * stored["scales"][group]).float().T


def pack_quantized(stored, config):
    """compressed-tensors: signed numbers plus 8 in words along the inputs, a scale a group."""
    rows, columns = stored["weight_shape"].tolist()
    codes = nibbles(stored["weight_packed"], 1)[:, :columns] - 8
    scale = stored["weight_scale"].float()
    return codes * scale.repeat_interleave(columns // scale.shape[1], 1).view(rows, columns)


def with_scale_of_row(stored, config):
    """compressed-tensors' int8 and float8 of a channel."""
    return stored["weight"].float() * stored["weight_scale"].float()


def with_scale_of_block(stored, config):
    """Fine-grained float8 of DeepSeek's checkpoints: a scale for each block, by which the numbers are multiplied."""
    high, wide = config["weight_block_size"]
    scale = stored["weight_scale_inv"].repeat_interleave(high, 0).repeat_interleave(wide, 1)
    rows, columns = stored["weight"].shape
    return stored["weight"].float() * scale[:rows, :columns]


def bnb_4_bits(stored, config):
    """bitsandbytes: two codes a byte, the first one high; a table; the largest number of each block, also in 8 bits."""
    (state,) = (json.loads(bytes(v.tolist())) for k, v in stored.items() if ".quant_state." in k)
    data = stored["weight"].flatten().long()
    codes = torch.stack([data >> 4, data & 15], 1).flatten()
    largest = stored["weight.absmax"]
    if "nested_blocksize" in state:
        outer = stored["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(largest)]
        largest = stored["weight.nested_quant_map"][largest.long()] * outer + state["nested_offset"]
    largest = largest.repeat_interleave(state["blocksize"])[: len(codes)]
    return (stored["weight.quant_map"][codes] * largest).view(state["shape"]).float()


def bnb_8_bits(stored, config):
    """bitsandbytes' LLM.int8: the largest number of each row, of 127."""
    return stored["weight"].float() * stored["SCB"].unsqueeze(1) / 127


def hqq_4_bits(stored, config):
    """hqq with axis 1: the first half of the groups in the high bits; ``(code - zero) * scale``."""
    packed = stored["W_q"].long()
    codes = torch.cat([packed >> 4, packed & 15])
    return ((codes - stored["zero"].float()) * stored["scale"].float()).view(tuple(stored["shape"]))


def gguf_blocks(data, kind):
    """GGUF's blocks of 32: a float16 scale, Q4_1 also a float16 least value; 4 bits with the first 16 numbers low."""
    heads = 2 if kind == "Q4_1" else 1
    blocks = torch.from_numpy(data.copy()).unflatten(1, (-1, 2 * heads + (32 if kind == "Q8_0" else 16)))
    scale, *least = blocks[..., : 2 * heads].contiguous().view(torch.float16).float().split(1, -1)
    body = blocks[..., 2 * heads :].contiguous()
    codes = body.view(torch.int8) if kind == "Q8_0" else torch.cat([body & 15, body >> 4], -1)
    values = (codes.float() - (8 if kind == "Q4_0" else 0)) * scale
    return (values + least[0] if least else values).flatten(1)
