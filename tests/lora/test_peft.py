"""The real package loads what is written, and computes what our fold does."""

import copy
import json

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from tests.reference import randomize, rel

pytestmark = [
    pytest.mark.needs("peft", "transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
peft = pytest.importorskip("peft")


class Mixed(nn.Module):
    """A layer of each kind that LoRA knows; two paths end alike."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed, self.a, self.inner = nn.Embedding(19, 12), nn.Linear(12, 20), nn.Module()
        self.inner.a = nn.Linear(20, 8, bias=False)
        self.gpt, self.conv1 = Conv1D(8, 8), nn.Conv1d(8, 6, 3, padding=1)
        self.conv2, self.point = nn.Conv2d(6, 10, (3, 2), stride=2, padding="valid"), nn.Conv2d(10, 4, 1)
        self.conv3 = nn.Conv3d(1, 2, (1, 2, 2))
        self.norm = nn.LayerNorm(8)

    def forward(self, ids):
        x = self.norm(self.gpt(self.inner.a(self.a(self.embed(ids)).relu())))
        x = self.conv1(x.transpose(1, 2)).unflatten(2, (5, -1))
        return self.conv3(self.point(self.conv2(x)).unsqueeze(1))


RULES = {"*conv3": OFT(4), "*conv2": OFT(9), "*conv1": OFT(8), "*point": OFT(5), "*": OFT(4)}


@pytest.fixture
def ids():
    return torch.randint(19, (3, 40))


@pytest.mark.parametrize("seen", [False, True])
def test_every_kind_of_layer_at_full_rank(tmp_path, ids, seen):
    base = Mixed().eval()
    model = randomize(oftfx.transform(copy.deepcopy(base), RULES), 0.15)
    report = oftfx.to_lora(model, tmp_path, rank=999, calibration=[(ids,)] if seen else None)
    assert len(report) == 8
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    wrapped = {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert wrapped == {s.fqn for s in report}
    folded = oftfx.fold(model).model(ids)
    assert rel(folded, base(ids)) > 0.05
    assert rel(theirs(ids), folded) <= 1e-5
    assert rel(theirs.merge_and_unload()(ids), folded) <= 1e-5


def test_ranks_by_site_are_read_as_they_are_meant(tmp_path, ids):
    base = Mixed().eval()
    model = randomize(oftfx.transform(copy.deepcopy(base), {"*a": OFT(4), "*gpt": OFT(4)}), 0.15)
    with torch.no_grad():  # the two paths that end alike get different ranks
        model.inner.a.oft.default.skew[1:] = 0
    report = oftfx.to_lora(model, tmp_path, energy=0.95)
    ranks = {s.fqn: s.rank for s in report}
    assert ranks["a"] != ranks["inner.a"]
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    for fqn, rank in ranks.items():
        layer = theirs.base_model.model.get_submodule(fqn)
        assert (layer.r["default"], layer.scaling["default"]) == (rank, 1.0)
    assert rel(theirs(ids), model(ids)) < 0.2 * rel(base(ids), model(ids)) ** 0.5


def test_a_path_that_is_the_end_of_another(tmp_path, ids):
    base = Mixed().eval()
    model = randomize(oftfx.transform(copy.deepcopy(base), {"a": OFT(4)}), 0.15)
    oftfx.to_lora(model, tmp_path, rank=99)
    assert isinstance(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"], str)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert rel(theirs(ids), oftfx.fold(model).model(ids)) <= 1e-5
    assert [n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")] == ["a"]


@pytest.mark.parametrize("bias", ["none", "oft", "all"])
def test_what_trains_whole_goes_with_it(tiny_llama, tmp_path, bias, request):
    make = request.getfixturevalue("tiny_llama")
    batch = {"input_ids": torch.randint(5, 131, (2, 9))}
    model = oftfx.transform(make(), {"*.[qv]_proj": OFT(8)}, train=["lm_head"], train_bias=bias)
    randomize(model, 0.05)
    expected = model.eval()(**batch).logits
    oftfx.to_lora(model, tmp_path, rank=99)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert rel(theirs(**batch).logits, expected) <= 1e-5
    assert rel(make()(**batch).logits, expected) > 0.1


@pytest.mark.needs("accelerate", "bitsandbytes")
@pytest.mark.filterwarnings("ignore:.*kernels.*")
def test_on_an_nf4_base(tiny_llama, ids, tmp_path):
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    tiny_llama(intermediate_size=128).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    options = {"quantization_config": config, "device_map": {"": "cpu"}, "dtype": torch.float32}

    def make():
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", **options).eval()

    batch = {"input_ids": torch.randint(5, 131, (2, 9))}
    model = randomize(oftfx.transform(make(), {"all-linear": OFT(16)}), 0.05)
    report = oftfx.to_lora(model, tmp_path / "lora", rank=128, calibration=[batch])
    assert {s.format for s in report} == {"bnb4"}
    # In eval mode the package rounds all scales to bfloat16 on some CPUs. There is no dropout in this model.
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "lora").train()
    assert type(theirs.base_model.model.model.layers[0].mlp.up_proj).__module__ == "peft.tuners.lora.bnb"
    folded = oftfx.fold(model, quantized="float").model(**batch).logits
    assert rel(make().train()(**batch).logits, folded) > 0.1
    assert rel(theirs(**batch).logits, folded) <= 1e-5
