"""Folded models in llama.cpp itself: torch's tokens, and the tokenizer's."""

import warnings

import pytest
import torch

import oftfx
from oftfx import OFT
from tests.gguf.tokenizers import AWKWARD, bytes_as_letters, pieces
from tests.reference import randomize
from tests.serving.node import node
from tests.serving.vllm_server import greedy, same, spread

pytestmark = [pytest.mark.server, pytest.mark.needs("gguf", "transformers")]
SIZES = {
    "vocab_size": 350, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
FAMILIES = {
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 48}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "linear": ("Llama", {"rope_parameters": LINEAR}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 64}),
    "gemma": ("Gemma", {"head_dim": 48}),
    "gemma2": ("Gemma2", {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 8}),
    "phi3": ("Phi3", {"sliding_window": None}),
}
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [100, 200, 300, 17, 18], [33]]
COUNT = 32
TIE = 1e-3
"""By how much the best token is ahead where sums in another order may choose another."""
ROUNDED = 0.3
"""The same where llama.cpp rounds the inputs of quantized layers to 8 bits, which torch here does not."""


def made(name, **changes):
    """A model of a family whose tokens are far from each other, with numbers in norms and biases as well."""
    import transformers

    family, options = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**SIZES | options | changes)
    model = spread(getattr(transformers, f"{family}ForCausalLM")(config).eval())
    for path, parameter in model.named_parameters():
        if "norm" in path:
            torch.nn.init.normal_(parameter, float(not family.startswith("Gemma")), 0.2)
        elif parameter.dim() == 1 or (config.tie_word_embeddings and "embed" in path):
            torch.nn.init.normal_(parameter, std=0.03 if family.startswith("Gemma") else 0.1)
    return model


def check(got, expected, tie):
    """Every prompt of every run; more than half of the tokens of a run are not one and the same."""
    for name, answers in expected.items():
        assert not isinstance(got[name], str), (name, got[name])
        for tokens, answer in zip(got[name], answers, strict=True):
            assert len(tokens) == COUNT, name
            assert same(tokens, answer, tie), (name, tokens, answer)
    assert all(len({t for tokens, _ in answers for t in tokens}) > 20 for answers in expected.values())


def test_every_family_gives_torchs_tokens(tmp_path):
    """Folded, in float32: 32 tokens of four prompts."""
    runs, expected = {}, {}
    for name in FAMILIES:
        model = randomize(oftfx.transform(made(name), {"all-linear": OFT(16)}), std=0.05)
        folded = oftfx.fold(model).model
        report = oftfx.export_gguf(folded, tmp_path / f"{name}.gguf", tokenizer=bytes_as_letters(340))
        assert report.lossless
        runs[name], expected[name] = str(report.path), [greedy(folded, p, COUNT) for p in PROMPTS]
    check(node("llama_cpp.mjs", tmp_path, runs=runs, prompts=PROMPTS, count=COUNT), expected, TIE)


@pytest.mark.needs("gptqmodel")
def test_folds_in_four_bits(tmp_path):
    """GPTQ, symmetric and not, with the codes that the fold chose: as Q4_0, and as Q8_0."""
    from oftfx.formats.gptq import make_gptq

    runs, expected = {}, {}
    for name, kind in (("symmetric", "Q4_0"), ("asymmetric", "Q8_0")):
        model = made("biases")
        for path, layer in list(model.named_modules()):
            if isinstance(layer, torch.nn.Linear) and path != "lm_head":
                model.set_submodule(path, make_gptq(layer, group_size=32, sym=name == "symmetric"))
        model = randomize(oftfx.transform(model, {"all-linear": OFT(16)}), std=0.05)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", oftfx.errors.OftfxWarning)
            folded = oftfx.fold(model, quantized="requantize").model
        report = oftfx.export_gguf(folded, tmp_path / f"{name}.gguf", tokenizer=bytes_as_letters(340))
        assert report.types[kind] == 14
        assert max(t.error for t in report.tensors) < 3e-4
        runs[name], expected[name] = str(report.path), [greedy(folded, p, COUNT) for p in PROMPTS]
    check(node("llama_cpp.mjs", tmp_path, runs=runs, prompts=PROMPTS, count=COUNT), expected, ROUNDED)


def test_tokenizers_give_the_same_tokens(tmp_path):
    """Of texts with digits, blanks, letters that no token has, and special tokens."""
    tokenizers = {
        "letters": bytes_as_letters(340), "no digits": bytes_as_letters(340, digits=False), "pieces": pieces(400),
    }  # fmt: skip
    model = made("qwen2", vocab_size=420, num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    runs = {n: str(oftfx.export_gguf(model, tmp_path / f"{n}.gguf", tokenizer=t).path) for n, t in tokenizers.items()}
    got = node("llama_cpp.mjs", tmp_path, runs=runs, texts=AWKWARD)
    for name, tokenizer in tokenizers.items():
        assert got[name] == [tokenizer(text)["input_ids"] for text in AWKWARD], name
        assert sum(map(len, got[name])) > 100


@pytest.mark.real
def test_smollm2_by_the_directory_of_its_tokenizer(smollm2, tmp_path):
    """Folded on some sites; unfolded, its grid of 4 bits comes again. `tools/compare/compare_runtimes.py` has more."""
    model, tokenizer = smollm2
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    same_grid = oftfx.export_gguf(model, tmp_path / "q.gguf", tokenizer=tmp_path / "tokenizer", quantized="Q4_1")
    assert same_grid.lossless
    assert same_grid.types == {"F32": 62, "Q4_1": 210}
    adapted = randomize(oftfx.transform(model, {"*.o_proj": OFT(32)}), std=0.02)
    folded = oftfx.fold(adapted).model
    report = oftfx.export_gguf(folded, tmp_path / "m.gguf", tokenizer=tmp_path / "tokenizer")
    prompt, runs = tokenizer("The capital of France is")["input_ids"], {"m": str(report.path)}
    cut = node("llama_cpp.mjs", tmp_path, runs=runs, texts=AWKWARD)["m"]
    assert cut == [tokenizer(text)["input_ids"] for text in AWKWARD]
    (got,) = node("llama_cpp.mjs", tmp_path, runs=runs, prompts=[prompt], count=8)["m"]
    assert same(got, greedy(folded, prompt, 8), TIE)
