"""A Trainer's checkpoint of a transformed model, and what else is a state_dict of one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError, AdapterFileError
from tests.adapter.conventions.models import net, outputs
from tests.reference import randomize, rel

RULES = {"*.q_proj": OFT(8), "*.down_proj": OFT(16, parameterization="cayley", coft_eps=0.4)}


@pytest.mark.needs("transformers", "accelerate")
@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_checkpoint_of_trainer_gives_the_adapter(tiny_llama, ids, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = oftfx.transform(tiny_llama(), RULES, train=["lm_head"])
    batch = {k: v[0] for k, v in ids().items()}
    data = [{**batch, "labels": batch["input_ids"]}] * 4
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, learning_rate=0.05, use_cpu=True, report_to=[], disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=data).train()
    directory = tmp_path / "checkpoint-2"
    assert oftfx.adapter_convention(directory) == "checkpoint"
    expected = model.eval()(**ids()).logits
    fresh = oftfx.transform(tiny_llama(), RULES, train=["lm_head"])
    assert rel(fresh(**ids()).logits, expected) > 1e-2
    loaded = oftfx.load_adapter(fresh, directory).eval()
    assert torch.equal(loaded(**ids()).logits, expected)
    saved = oftfx.save_adapter(loaded, tmp_path / "adapter", convention="oftfx")
    assert torch.equal(oftfx.load_adapter(tiny_llama(), saved).eval()(**ids()).logits, expected)
    with pytest.raises(
        AdapterError, match="numbers and not how they become rotations: transform the model by the rules"
    ):
        oftfx.load_adapter(tiny_llama(), directory)
    with pytest.raises(AdapterError, match="transform the model by the rules that the checkpoint was trained with"):
        oftfx.load_adapter(oftfx.transform(tiny_llama(), {"*.q_proj": OFT(4), "*.down_proj": OFT(16)}), directory)


def state(tmp_path, rules, *names, std=0.1):
    model = oftfx.transform(net(), rules, adapter=names[0])
    for name in names[1:]:
        oftfx.add_adapter(model, name, rules)
    randomize(model, std=std)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return model.eval()


def test_names_of_adapters(tmp_path):
    model = state(tmp_path, {"proj": OFT(4)}, "a", "b")
    fresh = oftfx.transform(net(), {"proj": OFT(4)}, adapter="b").eval()
    oftfx.load_adapter(fresh, tmp_path, adapter="b")
    oftfx.set_adapter(model, "b")
    assert torch.equal(outputs(fresh), outputs(model))
    with pytest.raises(AdapterFileError, match="no adapter 'default', but a, b; load under one of these names"):
        oftfx.load_adapter(oftfx.transform(net(), {"proj": OFT(4)}), tmp_path)
    model = state(tmp_path, {"proj": OFT(4)}, "only")
    fresh = oftfx.load_adapter(oftfx.transform(net(), {"proj": OFT(4)}), tmp_path / "model.safetensors").eval()
    assert torch.equal(outputs(fresh), outputs(model))


def test_shared_and_tied_rotations(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            return self.a(x) + self.b(x)

    x, rules = torch.randn(2, 8), {"*": OFT(4, share_input=True)}
    model = randomize(oftfx.transform(Pair(), rules, example_inputs=(x,)))
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    fresh = oftfx.load_adapter(oftfx.transform(Pair(), rules, example_inputs=(x,)), tmp_path / "x.safetensors")
    assert torch.equal(fresh(x), model(x))
    with pytest.raises(AdapterFileError, match=r"no b\.oft\.default\.skew, which adapter 'default' of this model has"):
        oftfx.load_adapter(oftfx.transform(Pair(), {"*": OFT(4)}), tmp_path / "x.safetensors")


def test_shards(tmp_path):
    model = state(tmp_path, {"proj": OFT(4), "conv_in": OFT(6)}, "default")
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    halves = [{k: v for i, (k, v) in enumerate(tensors.items()) if i % 2 == n} for n in range(2)]
    index = {"weight_map": {k: f"model-{n}.safetensors" for n, half in enumerate(halves) for k in half}}
    for n, half in enumerate(halves):
        save_file(half, tmp_path / f"model-{n}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    fresh = oftfx.transform(net(), {"proj": OFT(4), "conv_in": OFT(6)}).eval()
    assert torch.equal(outputs(oftfx.load_adapter(fresh, tmp_path)), outputs(model))
    less = oftfx.transform(net(), {"proj": OFT(4)})
    with pytest.raises(AdapterFileError, match=r"has conv_in\.oft\.default\.skew, and adapter 'default' of this model"):
        oftfx.load_adapter(less, tmp_path)
    for name in ("../model-0.safetensors", "/etc/passwd", "model-0.bin", "sub/model-0.safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"proj.weight": name}}))
        with pytest.raises(AdapterFileError, match="which is no safetensors file beside it"):
            oftfx.load_adapter(fresh, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-9.safetensors"}}')
    with pytest.raises(AdapterFileError, match="names model-9.safetensors, which is not there"):
        oftfx.load_adapter(fresh, tmp_path)


def test_a_checkpoint_is_not_written_by_save_adapter(tmp_path):
    with pytest.raises(AdapterError, match="convention: got 'checkpoint', expected one of"):
        oftfx.save_adapter(oftfx.transform(net(), {"proj": OFT(4)}), tmp_path, convention="checkpoint")
