"""A model that transformers has loaded in 4 bits: Trainer, Accelerate, generate and checkpoints."""

import pytest
import torch

import oftfx
from oftfx import OFT
from tests.ecosystem.twin import gradients, skews, values
from tests.reference import dense_rotation, randomize, rel

pytestmark = [
    pytest.mark.needs("transformers", "accelerate", "bitsandbytes"),
    pytest.mark.usefixtures("_accelerate_state"),
    pytest.mark.filterwarnings("ignore:.*kernels.*"),
]


@pytest.fixture
def quantized(tiny_llama, tmp_path):
    """The tiny Llama as `from_pretrained` loads it in NF4."""
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    tiny_llama(intermediate_size=128).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def load():
        return LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
        ).eval()

    return load


@pytest.fixture
def plain(tiny_llama):
    """The tiny Llama in floats, its weights rounded to NF4 by the package's own functions, then rotated densely."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def make(model):
        result = tiny_llama(intermediate_size=128)
        for entry in oftfx.adapters(model)["default"]:
            weight = result.get_submodule(entry.fqn).weight
            rounded = dequantize_4bit(*quantize_4bit(weight.data, quant_type="nf4")).float()
            skew = model.get_parameter(f"{entry.owner}.oft.default.skew").detach()
            weight.data = (rounded.double() @ dense_rotation(skew, entry.block_size, entry.blocks).T).float()
        return result

    return make


@pytest.mark.parametrize("share", [False, True])
def test_outputs_and_tokens_are_those_of_the_rounded_plain_model(quantized, plain, ids, share):
    model = randomize(oftfx.transform(quantized(), {"all-linear": OFT(16, share_input=share)}), std=0.1)
    assert {e.site.format for e in oftfx.adapters(model)["default"]} == {"bnb4"}
    twin = plain(model)
    assert rel(model(**ids()).logits, twin(**ids()).logits) < 1e-5
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = twin.generate(**ids(2, 5), **options)
    assert torch.equal(model.generate(**ids(2, 5), **options), expected)
    assert torch.equal(oftfx.fold(model, quantized="float").model.generate(**ids(2, 5), **options), expected)


def test_trainer_takes_it(quantized, ids, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = oftfx.transform(quantized(), {"all-linear": OFT(16, share_input=True)})
    before = {n: v.clone() for n, v in model.state_dict().items()}
    rows = [
        {**{k: v[0] for k, v in ids(1, 9, seed=s).items()}, "labels": ids(1, 9, seed=s)["input_ids"][0]}
        for s in range(8)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, save_strategy="steps", save_steps=3, logging_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == set(skews(model))


def test_accelerate_takes_it(quantized, ids):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = oftfx.transform(quantized(), {"all-linear": OFT(16)}).train()
    optimizer = torch.optim.AdamW(oftfx.adapter_parameters(model), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(**ids(), labels=ids()["input_ids"]).loss)
    optimizer.step()
    assert all(p.any() for p in values(model).values())


def test_checkpointed_gradients_are_those_of_the_plain_model(quantized, ids):
    model = randomize(oftfx.transform(quantized(), {"all-linear": OFT(16, share_input=True)}), std=0.1).train()
    batch = {**ids(), "labels": ids()["input_ids"], "use_cache": False}
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model(**batch).loss.backward()
    assert all(rel(gradients(model)[n], g) < 1e-6 for n, g in expected.items())


POLICIES = {
    "keep": "keep",
    "requantize": "requantize",
    "float": "float",
    "mixed": lambda site: "float" if "mlp" in site.fqn else "requantize",
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.filterwarnings("ignore::oftfx.errors.OftfxWarning")
def test_a_folded_model_is_saved_and_loaded(quantized, ids, tmp_path, policy):
    """As a plain model; only `keep` leaves rotations in front, which a plain class does not know and names."""
    model = randomize(oftfx.transform(quantized(), {"all-linear": OFT(16)}), std=0.1)
    folded = oftfx.fold(model, quantized=POLICIES[policy]).model
    folded.save_pretrained(tmp_path / "out")
    again, info = type(model).from_pretrained(tmp_path / "out", device_map={"": "cpu"}, output_loading_info=True)
    if policy == "keep":
        assert info["unexpected_keys"]
        assert all(".oft." in n for n in info["unexpected_keys"])
    else:
        assert not any(info.values()), info
        assert rel(again.eval()(**ids()).logits, folded(**ids()).logits) < 1e-5
