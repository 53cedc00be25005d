"""What a PEFT configuration stands for, field by field."""

import sys

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx.errors import OftfxWarning, RuleError
from tests.reference import dense_rotation, randomize, rel

pytestmark = [
    pytest.mark.needs("peft", "transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
peft = pytest.importorskip("peft")


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_without_targets_the_architectures_own_are_taken(request, kind):
    make = request.getfixturevalue(f"tiny_{kind}")
    config = peft.OFTConfig(oft_block_size=8)
    assert config.target_modules is None
    ours = oftfx.plan(make(), config)
    assert config.target_modules is None  # PEFT writes into what it is given
    theirs = peft.get_peft_model(make(), peft.OFTConfig(oft_block_size=8))
    names = [n.removeprefix("base_model.model.") for n, _ in theirs.named_parameters() if ".oft_R." in n]
    assert {e.fqn for e in ours} == {n.partition(".oft_R.")[0] for n in names}


def test_without_targets_and_without_a_known_architecture(monkeypatch, tiny_llama):
    config = peft.OFTConfig(oft_block_size=8)
    with pytest.raises(RuleError, match=r"PEFT has none for Sequential \(model_type None\); give target_modules"):
        oftfx.plan(nn.Sequential(nn.Linear(8, 8)), config)
    model = tiny_llama()
    monkeypatch.setitem(sys.modules, "peft.utils.constants", None)
    with pytest.raises(RuleError, match="no peft here to ask what it takes; give target_modules"):
        oftfx.plan(model, config)


class Gpt2Layer(nn.Module):
    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.c_attn, self.out = Conv1D(24, 8), nn.Linear(24, 8)

    def forward(self, x):
        return self.out(self.c_attn(x))


def test_fan_in_fan_out_is_taken_for_what_it_is_true_of():
    """PEFT's OFT refuses Conv1D whatever is said of it."""
    config = peft.OFTConfig(oft_block_size=4, target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(TypeError, match="Conv1D"):
        peft.get_peft_model(Gpt2Layer(), config)
    model = randomize(oftfx.transform(Gpt2Layer(), config), std=0.3)
    x = torch.randn(5, 8, dtype=torch.float64)
    weight, skew = model.c_attn.weight.double(), model.c_attn.oft.default.skew
    expected = model.out.double()(x @ dense_rotation(skew, 4) @ weight + model.c_attn.bias.double())
    assert rel(model.double()(x), expected) < 1e-12


def test_fan_in_fan_out_is_passed_over_with_a_warning_where_peft_does():
    config = peft.OFTConfig(oft_block_size=4, target_modules=["out"], fan_in_fan_out=True)
    with pytest.warns(OftfxWarning, match="fan_in_fan_out=True, but out is a Linear; how a layer stores"):
        ours = oftfx.transform(Gpt2Layer(), config)
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"):
        peft.get_peft_model(Gpt2Layer(), config)
    assert [e.fqn for e in oftfx.adapters(ours)["default"]] == ["out"]


def test_inference_mode():
    def base():
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))

    config = peft.OFTConfig(oft_block_size=4, target_modules=["0"], modules_to_save=["1"], inference_mode=True)
    model = oftfx.transform(base(), config)
    theirs = peft.get_peft_model(base(), config)
    assert not any(p.requires_grad for m in (model, theirs) for p in m.parameters())
    oftfx.set_adapter(model, "default", trainable=True)
    assert sum(p.requires_grad for p in model.parameters()) == 3
