"""Blends in every kind of site: twice half of an adapter, one after the other, is the whole one."""

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError
from tests.reference import randomize, rel


class Layers(nn.Module):
    """Sites that rotate what they read, what they give out, or their weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(17, 12), nn.Conv2d(12, 6, 3, padding=1)
        self.point, self.grouped = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, (1, 3), groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids):
        x = self.grouped(self.point(self.conv(self.embed(ids).movedim(-1, 1))).tanh())
        x = x.flatten(2).transpose(1, 2)
        return self.attention(x, x, x)[0]


def halves(model, x):
    """The outputs of the whole adapter, and of its half twice in a row."""
    oftfx.blend(model, {"default": 0.5}, into="first")
    oftfx.blend(model, {"default": 0.5}, into="second")
    outputs = []
    with torch.no_grad():
        for names in ("default", ["first", "second"]):
            oftfx.set_adapter(model, names)
            outputs.append(model(**x) if isinstance(x, dict) else model(x))
    return outputs


def test_sites_of_every_placement():
    base, ids = Layers().double().eval(), torch.randint(17, (2, 5, 6))
    spec = OFT(3, parameterization="cayley", on_indivisible="nearest")
    model = randomize(oftfx.transform(base, {"*": spec}), 0.2)
    assert len(oftfx.adapters(model)["default"]) == 6
    whole, twice = halves(model, ids)
    assert rel(whole, base(ids)) > 0.05
    assert rel(twice, whole) < 1e-12


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("experts", ["shared", "each"])
def test_experts(ids, experts, share):
    from transformers import MixtralConfig, MixtralForCausalLM

    small = {
        "vocab_size": 131, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8,
    }  # fmt: skip
    base = MixtralForCausalLM(MixtralConfig(**small)).eval()
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.2)
    spec = OFT(8, experts=experts, block_share=share, parameterization="cayley")
    model = randomize(oftfx.transform(base, {"*.experts.*_proj": spec}), 0.1)
    oftfx.add_adapter(model, "finer", {"*.experts.*_proj": OFT(4, experts=experts, parameterization="cayley")})
    whole, twice = halves(model, ids())
    assert rel(whole.logits, base(**ids()).logits) > 0.05
    assert rel(twice.logits, whole.logits) < 1e-5
    report = oftfx.blend(model, {"default": 1.0, "finer": 1.0}, into="both")  # the finer one is the identity
    assert {s.block_size for s in report} == {8}
    oftfx.set_adapter(model, "both")
    with torch.no_grad():
        assert rel(model(**ids()).logits, whole.logits) < 1e-5
    with pytest.raises(AdapterError, match=r"experts\.gate_up_proj .* cannot be LoRA"):
        oftfx.to_lora(model, "unused", rank=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_was_cast_gets_what_its_weights_ask_for(dtype):
    base = nn.Sequential(nn.Linear(12, 5))
    model = randomize(oftfx.transform(base, {"*": OFT(4, parameterization="cayley")}), 0.2).to(dtype)
    oftfx.blend(model, {"default": 0.5}, into="mild")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert model[0].oft.mild.skew.dtype == wide
    found = [oftfx.rotation_angles(model, name)["0"].angles for name in ("default", "mild")]
    angles = [torch.tensor(a, dtype=torch.float64) for a in found]
    assert (angles[1] - angles[0] / 2).abs().max() < (1e-7 if wide == torch.float32 else 1e-14)


def test_on_the_meta_device_there_is_nothing_to_blend():
    with torch.device("meta"):
        model = oftfx.transform(nn.Sequential(nn.Linear(12, 5)), {"*": OFT(4)})
    with pytest.raises(AdapterError, match="0: the rotation is on the meta device"):
        oftfx.blend(model, {"default": 0.5}, into="mild")
