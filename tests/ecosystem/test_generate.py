"""`generate` with every cache and every way to decode: the tokens are those of the plain rotated model."""

import importlib.util
import inspect

import pytest
import torch

import oftfx
from oftfx import OFT
from oftfx.onnx.decoders.decoder import cache_name
from tests.ecosystem.twin import dense_twin
from tests.reference import randomize

pytestmark = pytest.mark.needs("transformers")

NEW = 8
_no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads from a CUDA device only")
_no_quanto = pytest.mark.skipif(importlib.util.find_spec("optimum") is None, reason="needs optimum-quanto")
CACHES = [
    pytest.param({"use_cache": False}, id="none"),
    *(pytest.param({"cache_implementation": c}, id=c) for c in ("dynamic", "static")),
    *(pytest.param({"cache_implementation": c}, id=c, marks=_no_cuda) for c in ("offloaded", "offloaded_static")),
    pytest.param({"cache_implementation": "quantized"}, id="quantized", marks=_no_quanto),
]
DECODING = [
    pytest.param({"do_sample": False}, id="greedy"),
    pytest.param({"do_sample": False, "num_beams": 3}, id="beams"),
    pytest.param({"do_sample": False, "num_beams": 4, "num_return_sequences": 2}, id="two-of-four-beams"),
    pytest.param({"do_sample": True, "top_k": 20, "temperature": 0.7}, id="sampling"),
    pytest.param({"do_sample": True, "num_beams": 3}, id="beam-sampling"),
    pytest.param({"do_sample": False, "prompt_lookup_num_tokens": 3}, id="prompt-lookup"),
]


def tokens(model, inputs, **options):
    torch.manual_seed(7)
    return model.generate(**inputs, min_new_tokens=NEW, max_new_tokens=NEW, **options)


def left_padded(ids, device):
    inputs = ids(2, 5)
    inputs["input_ids"][0, :2], inputs["attention_mask"][0, :2] = 0, 0
    return {k: v.to(device) for k, v in inputs.items()}


@pytest.mark.parametrize("options", CACHES)
@pytest.mark.parametrize("share", [False, True])
def test_every_cache_gives_the_tokens_of_the_plain_model(rotated, ids, share, options):
    device = "cuda" if "offloaded" in options.get("cache_implementation", "") else "cpu"
    base, model = rotated(share, dtype=torch.float64)
    twin = dense_twin(base, model).to(device)
    base, model, inputs = base.to(device), model.to(device), left_padded(ids, device)
    got = tokens(model, inputs, do_sample=False, **options)
    assert torch.equal(got, tokens(twin, inputs, do_sample=False))
    assert torch.equal(got, tokens(oftfx.fold(model).model, inputs, do_sample=False, **options))
    assert not torch.equal(got, tokens(base, inputs, do_sample=False, **options))


def test_a_cache_filled_by_hand_continues(rotated, ids):
    from transformers import DynamicCache

    base, model = rotated(dtype=torch.float64)
    inputs = ids(1, 6)
    cache = {cache_name(inspect.signature(model.forward).parameters): DynamicCache(config=model.config)}
    with torch.no_grad():
        model(input_ids=inputs["input_ids"][:, :4], **cache)
    assert torch.equal(
        tokens(model, inputs, do_sample=False, **cache),
        tokens(dense_twin(base, model), inputs, do_sample=False),
    )


@pytest.mark.parametrize("options", DECODING)
def test_every_decoding_gives_the_tokens_of_the_plain_model(rotated, ids, options):
    base, model = rotated(dtype=torch.float64)
    inputs = ids(1 if "prompt_lookup_num_tokens" in options else 2, 5)
    got = tokens(model, inputs, **options)
    assert torch.equal(got, tokens(dense_twin(base, model), inputs, **options))
    assert torch.equal(got, tokens(oftfx.fold(model).model, inputs, **options))


@pytest.mark.parametrize("options", DECODING)
def test_at_identity_the_tokens_are_the_base_models(tiny_llama, ids, options):
    base = tiny_llama()
    model = oftfx.transform(base, {"all-linear": OFT(16, share_input=True)})
    inputs = ids(1, 5)
    assert torch.equal(tokens(model, inputs, **options), tokens(base, inputs, **options))


def test_the_base_drafts_for_the_transformed_model(rotated, ids):
    base, model = rotated(dtype=torch.float64)
    inputs = ids(1, 5)
    got = tokens(model, inputs, do_sample=False, assistant_model=base)
    assert torch.equal(got, tokens(dense_twin(base, model), inputs, do_sample=False))


def test_scores_are_those_of_the_plain_model(rotated, ids):
    base, model = rotated(dtype=torch.float64)
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    got, expected = (tokens(m, ids(2, 5), **options).logits for m in (model, dense_twin(base, model)))
    assert len(got) == NEW
    assert all(torch.allclose(g, e, rtol=1e-10, atol=1e-12) for g, e in zip(got, expected, strict=True))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2, "vocab_size": 131}
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    ffn = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in [("ffn_dim", 48), ("layers", 2)]}
    heads = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    config = BartConfig(vocab_size=131, d_model=32, max_position_embeddings=64, **ffn, **heads, init_std=0.1)
    return BartForConditionalGeneration(config)


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("make", [t5, bart])
def test_seq2seq_gives_the_tokens_of_the_plain_model(make, ids, options):
    base = make().double().eval()
    model = randomize(oftfx.transform(base, {"all-linear": OFT(8)}), std=0.3)
    inputs = ids(2, 7)
    options = {"do_sample": False, **options}
    got = tokens(model, inputs, **options)
    assert torch.equal(got, tokens(dense_twin(base, model), inputs, **options))
    assert torch.equal(got, tokens(oftfx.fold(model).model, inputs, **options))
    assert not torch.equal(got, tokens(base, inputs, **options))
    oftfx.set_adapter(model, None)
    assert torch.equal(tokens(model, inputs, **options), tokens(base, inputs, **options))
