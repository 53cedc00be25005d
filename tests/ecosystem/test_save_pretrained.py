"""`save_pretrained` and `from_pretrained`: folded models are plain ones, unfolded ones still hold their base."""

import json

import pytest
import torch
from safetensors.torch import load_file

import oftfx
from oftfx import OFT
from tests.ecosystem.twin import dense_twin, skews
from tests.reference import randomize, rel

pytestmark = pytest.mark.needs("transformers")
EVERYTHING = {"all-linear": OFT(16), "lm_head": OFT(16)}


def reload(model, path, **kwargs):
    """Save, load as a plain model, and find every key in its place."""
    model.save_pretrained(path, **kwargs)
    again, info = type(model).from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return again.eval()


@pytest.mark.filterwarnings("ignore::oftfx.errors.OftfxWarning")
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_folded_model_loads_as_a_plain_one(rotated, ids, tmp_path, tied, share):
    base, model = rotated(share, tie_word_embeddings=tied)
    folded = oftfx.fold(model).model
    again = reload(folded, tmp_path)
    assert torch.equal(again(**ids()).logits, folded(**ids()).logits)
    assert rel(again(**ids()).logits, dense_twin(base, model)(**ids()).logits) < 1e-5
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    assert "oftfx" not in (tmp_path / "config.json").read_text()
    assert set(again.state_dict()) == set(base.state_dict())


@pytest.mark.parametrize("tied", [False, True])
def test_a_folded_head_is_its_own_afterwards(tiny_llama, ids, tmp_path, tied):
    base = tiny_llama(tie_word_embeddings=tied)
    model = randomize(oftfx.transform(base, EVERYTHING), std=0.1)
    twin = dense_twin(base, model)
    assert rel(model(**ids()).logits, twin(**ids()).logits) < 1e-5
    folded = oftfx.fold(model).model
    again = reload(folded, tmp_path)
    assert torch.equal(again(**ids()).logits, folded(**ids()).logits)
    assert rel(again(**ids()).logits, twin(**ids()).logits) < 1e-5
    assert torch.equal(again.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert base.config.tie_word_embeddings is tied
    assert model.config.tie_word_embeddings is tied
    assert (base.lm_head.weight is base.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt_neox"])
@pytest.mark.parametrize("tied", [False, True])
def test_tied_heads_of_other_models(ids, tmp_path, kind, tied):
    base = {"t5": t5, "bart": bart, "gpt_neox": gpt_neox}[kind](tied)
    head = next(n for n, m in base.named_modules() if m is base.get_output_embeddings())
    model = randomize(oftfx.transform(base, {head: OFT(8)}), std=0.2)
    inputs = {"input_ids": ids()["input_ids"]}
    if kind != "gpt_neox":
        inputs["decoder_input_ids"] = ids(2, 6, seed=3)["input_ids"]
    expected = dense_twin(base, model)(**inputs).logits
    assert rel(model(**inputs).logits, expected) < 1e-5
    folded = oftfx.fold(model).model
    assert rel(folded(**inputs).logits, expected) < 1e-5
    assert rel(reload(folded, tmp_path)(**inputs).logits, expected) < 1e-5
    assert torch.equal(base.get_input_embeddings().weight, folded.get_input_embeddings().weight)


def t5(tied):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 1, "vocab_size": 131}
    return T5ForConditionalGeneration(T5Config(**sizes, tie_word_embeddings=tied)).eval()


def bart(tied):
    from transformers import BartConfig, BartForConditionalGeneration

    parts = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in [("ffn_dim", 48), ("layers", 1)]}
    heads = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    config = BartConfig(vocab_size=131, d_model=32, max_position_embeddings=64, **parts, **heads)
    config.tie_word_embeddings = tied
    return BartForConditionalGeneration(config).eval()


def gpt_neox(tied):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=131, **sizes, tie_word_embeddings=tied)).eval()


def test_shards_and_dtypes(rotated, ids, tmp_path):
    base, model = rotated(dtype=torch.bfloat16)
    folded = oftfx.fold(model).model
    again = reload(folded, tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert again.dtype == torch.bfloat16
    expected = folded.state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in again.state_dict().items())
    wide = type(base).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert rel(wide(**ids()).logits, dense_twin(base.float(), model)(**ids()).logits) < 1e-2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_an_unfolded_model_is_saved_with_its_base(rotated, ids, tmp_path, share, tied):
    base, model = rotated(share, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    plain, info = type(base).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == set(skews(model))
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert torch.equal(plain.eval()(**ids()).logits, base(**ids()).logits)


def test_an_unfolded_model_comes_back_with_its_rotations(tiny_llama, rotated, ids, tmp_path):
    base, model = rotated(True)
    model.save_pretrained(tmp_path / "whole")
    oftfx.save_adapter(model, tmp_path / "adapter")
    plain = type(base).from_pretrained(tmp_path / "whole").eval()
    again = oftfx.load_adapter(plain, tmp_path / "adapter")
    again = plain if again is None else again
    assert torch.equal(again(**ids()).logits, model(**ids()).logits)
    fresh = oftfx.transform(tiny_llama(), {"all-linear": OFT(16, share_input=True)})
    fresh.load_state_dict(load_file(tmp_path / "whole" / "model.safetensors"))
    assert torch.equal(fresh(**ids()).logits, model(**ids()).logits)


def test_the_state_of_the_base_alone_is_saved(rotated, ids, tmp_path):
    base, model = rotated()
    own = {k: v for k, v in model.state_dict().items() if ".oft." not in k}
    model.save_pretrained(tmp_path, state_dict=own)
    again, info = type(base).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again.eval()(**ids()).logits, base(**ids()).logits)


def test_a_fold_that_is_undone_saves_as_before(rotated, ids, tmp_path):
    base, model = rotated(tie_word_embeddings=True)
    oftfx.unfold(oftfx.fold(model, inplace=True, undo=True))
    model.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**ids()).logits, base(**ids()).logits)
    assert again.config.tie_word_embeddings is True


def test_resized_embeddings_beside_rotations(rotated, ids, tmp_path):
    base, model = rotated()
    for network in (base, model):
        torch.manual_seed(2)
        network.resize_token_embeddings(140, mean_resizing=False)
    folded = oftfx.fold(model).model
    again = reload(folded, tmp_path)
    assert again(**ids()).logits.shape[-1] == 140
    assert rel(again(**ids()).logits, dense_twin(base, model)(**ids()).logits) < 1e-5
