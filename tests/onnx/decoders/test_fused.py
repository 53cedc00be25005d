"""Decoders whose attention is GroupQueryAttention: tokens equal torch's own, padded on the right; others stay plain."""

import json

import numpy as np
import pytest
import torch

import oftfx
from oftfx.errors import ExportError
from oftfx.onnx.fused import attention
from tests.onnx.test_decoder import (
    GROUPED,
    architecture,
    generated,
    lively,
    options,
    prompt,
    session,
    tenants,  # noqa: F401  (a fixture)
    tokens,
    torch_tokens,
)
from tests.reference import rel

pytestmark = pytest.mark.needs("onnx", "onnxruntime", "onnxscript", "transformers")
GQA, STEPS = "com.microsoft::GroupQueryAttention", 16


def to_the_right(padded):
    """The same prompts, padded on the other side."""
    lengths = padded["attention_mask"].sum(1)
    rolled = {n: torch.stack([row.roll(int(k)) for row, k in zip(v, lengths, strict=True)]) for n, v in padded.items()}
    assert bool(rolled["attention_mask"][:, 0].all())
    return rolled


def test_names_axes_and_operators(tenants, tmp_path):  # noqa: F811
    report = oftfx.export_onnx(tenants, tmp_path / "m.onnx", cache=True, fused=True)
    batch, past = {0: "batch"}, {0: "batch", 2: "past_sequence"}
    assert report.inputs == {
        "input_ids": {**batch, 1: "sequence"},
        "attention_mask": {**batch, 1: "total_sequence"},
        **{f"past_key_values.{i}.{kind}": past for i in (0, 1) for kind in ("key", "value")},
    }
    assert {i.name for i in session(tmp_path / "m.onnx").get_inputs()} == set(report.inputs)
    assert report.attention == "GroupQueryAttention"
    assert report.operators[GQA] == 2
    assert not {"Softmax", "Cos", "Sin", "Neg", "Identity", "Pow"} & set(report.operators)
    assert [(c.shapes["input_ids"], c.shapes["past_key_values.*.key"]) for c in report.checks] == [
        ((3, 6), (3, 2, 0, 16)),
        ((3, 1), (3, 2, 7, 16)),
        ((1, 3), (1, 2, 5, 16)),
        ((1, 1), (1, 2, 0, 16)),
    ]
    assert max(c.relative_error for c in report.checks) < 2e-6
    assert min(c.adapter_effect for c in report.checks) > 0.1
    plain = oftfx.export_onnx(tenants, tmp_path / "m.onnx", cache=True, verify=False)
    assert plain.attention == ""
    assert "position_ids" in plain.inputs


@pytest.mark.parametrize("mode", ["fixed", "folded", "swappable", "inputs", "mixed"])
def test_tokens_in_every_mode(tenants, tmp_path, mode):  # noqa: F811
    left = prompt(7, 11, 3)
    inputs, wanted = to_the_right(left), {}
    for name in (None, "a", "b"):
        oftfx.set_adapter(tenants, name)
        wanted[name] = torch_tokens(tenants, left, STEPS)
    assert len({w.tobytes() for w in wanted.values()}) == 3
    assert all(len(set(row)) > 3 for w in wanted.values() for row in w.tolist())
    path = tmp_path / "m.onnx"
    given = oftfx.fold(tenants).model if mode == "folded" else tenants
    how = "fixed" if mode == "folded" else mode
    report = oftfx.export_onnx(given, path, cache=True, fused=True, adapters=how)
    assert report.operators[GQA] == 2
    assert max(c.relative_error for c in report.checks) < 2e-6
    if how == "fixed":
        assert (tokens(path, inputs, STEPS) == wanted["b"]).all()
    elif mode == "mixed":
        names, rows = [None, "a", "b"], np.array([2, 0, 1])
        got = tokens(path, inputs, STEPS, inputs={"adapter_index": rows})
        for index, row in enumerate(rows):
            assert (got[index] == wanted[names[row]][index]).all()
    elif mode == "swappable":
        assert (tokens(path, inputs, STEPS) == wanted[None]).all()
        for name in ("a", "b"):
            file = oftfx.export_onnx_adapter(tenants, tmp_path / name, adapter=name, graph=path)
            run_options, _held = options(file)
            assert (tokens(path, inputs, STEPS, run_options=run_options) == wanted[name]).all()
    else:
        for name in ("a", "b"):
            found = {n: m for n, m in tenants.named_modules() if n.endswith(f".oft.{name}")}
            more = {n.removesuffix(f".{name}") + ".blocks": m.matrices().detach().numpy() for n, m in found.items()}
            assert (tokens(path, inputs, STEPS, inputs=more) == wanted[name]).all()


def test_padding_on_the_left_is_an_error_and_not_another_result(tenants, tmp_path):  # noqa: F811
    path, inputs = tmp_path / "m.onnx", prompt(7, 4)
    oftfx.export_onnx(tenants, path, cache=True, fused=True, verify=False)
    with pytest.raises(ExportError, match=r"a row is padded on the left.*fused=False"):
        tokens(path, inputs, 2)
    run = session(path)
    feed = {n: v.numpy() for n, v in inputs.items()}
    feed |= {i.name: np.zeros((2, 2, 0, 16), "float32") for i in run.get_inputs() if i.name.startswith("past")}
    with pytest.raises(Exception, match="indices element out of data bounds"):
        run.run(None, feed)
    feed["attention_mask"] = np.ones_like(feed["attention_mask"])
    run.run(None, feed)


def test_the_plain_graph_takes_padding_on_both_sides(tenants, tmp_path):  # noqa: F811
    path, left = tmp_path / "m.onnx", prompt(7, 4)
    oftfx.export_onnx(tenants, path, cache=True, verify=False)
    wanted = torch_tokens(tenants, left, STEPS)
    assert (tokens(path, left, STEPS) == wanted).all()
    assert (tokens(path, to_the_right(left), STEPS) == wanted).all()


def test_a_prompt_in_parts_is_the_prompt(tenants, tmp_path):  # noqa: F811
    """Against torch without any cache; then a second conversation turn of several tokens."""
    oftfx.export_onnx(tenants, tmp_path / "m.onnx", cache=True, fused=True, verify=False)
    run = session(tmp_path / "m.onnx")
    names = [o.name for o in run.get_outputs()]
    whole = prompt(13)
    with torch.no_grad():
        wanted = tenants(**whole, use_cache=False).logits
    cache = {i.name: np.zeros((1, 2, 0, 16), "float32") for i in run.get_inputs() if i.name.startswith("past")}
    parts, at, ids = [], 0, whole["input_ids"].numpy()
    for length in (4, 1, 7, 1):
        feed = {"input_ids": ids[:, at : at + length], "attention_mask": np.ones((1, at + length), np.int64)}
        result = dict(zip(names, run.run(names, {**feed, **cache}), strict=True))
        cache = {n: result[n.replace("past_key_values", "present")] for n in cache}
        parts.append(result["logits"])
        at += length
    assert rel(torch.from_numpy(np.concatenate(parts, 1)), wanted) < 2e-6


def other(name):
    import transformers as t

    if name == "gemma":  # norms whose weight counts from one
        return t.GemmaForCausalLM(t.GemmaConfig(**GROUPED, tie_word_embeddings=False))
    if name == "neox":  # a quarter of each head rotates, too little for the operator: it stays in front of it
        sizes = {**GROUPED, "hidden_size": 128}
        return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**{n: v for n, v in sizes.items() if n != "num_key_value_heads"}))
    if name == "phi":  # half of each head rotates
        return t.PhiForCausalLM(
            t.PhiConfig(**{**GROUPED, "hidden_size": 128, "head_dim": 32}, partial_rotary_factor=0.5)
        )
    if name == "phi3":
        return t.Phi3ForCausalLM(t.Phi3Config(**{**GROUPED, "hidden_size": 64}))
    if name == "cohere":  # neighbours rotate
        return t.CohereForCausalLM(t.CohereConfig(**GROUPED, tie_word_embeddings=False))
    if name == "granite":  # scores of another scale
        return t.GraniteForCausalLM(t.GraniteConfig(**GROUPED, attention_multiplier=0.3))
    if name == "llama3":  # frequencies scaled by parts
        rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        return t.LlamaForCausalLM(t.LlamaConfig(**GROUPED, rope_parameters=rope, max_position_embeddings=64))
    if name == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=131, bos_token_id=1, eos_token_id=1, **sizes))
    return architecture(name)


@pytest.mark.parametrize("name", ["qwen3", "gemma", "neox", "phi", "phi3", "cohere", "granite", "llama3", "gpt2"])
def test_other_architectures(name, tmp_path):
    model = lively(other(name)).eval()
    report = oftfx.export_onnx(model, tmp_path / "m.onnx", cache=True, fused=True)
    assert report.operators[GQA] == 2
    assert ("position_ids" in report.inputs) == (name in ("neox", "cohere", "gpt2"))
    left = prompt(9, 4)
    wanted = torch_tokens(model, left, STEPS)
    assert all(len(set(row)) > 3 for row in wanted.tolist())
    assert (tokens(tmp_path / "m.onnx", to_the_right(left), STEPS) == wanted).all()


def unlike(name):
    import transformers as t

    if name == "head of 12":
        return architecture("phi3")
    if name == "mistral":
        return t.MistralForCausalLM(t.MistralConfig(**GROUPED, sliding_window=6))
    if name == "gemma2":
        return t.Gemma2ForCausalLM(t.Gemma2Config(**GROUPED, layer_types=["full_attention"] * 2))
    if name == "gpt_oss":
        return t.GptOssForCausalLM(t.GptOssConfig(**GROUPED, num_local_experts=4, layer_types=["full_attention"] * 2))
    if name == "dynamic":
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        return t.LlamaForCausalLM(t.LlamaConfig(**GROUPED, rope_parameters=rope, max_position_embeddings=64))
    if name == "bloom":
        return t.BloomForCausalLM(t.BloomConfig(vocab_size=131, hidden_size=64, n_layer=2, n_head=4))
    return t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)).double()


WHY = {
    "head of 12": "a multiple of 8",
    "mistral": "(not simply causal|a sliding window)",
    "gemma2": "(not simply causal|capped scores)",
    "gpt_oss": "(not simply causal|attention sinks)",
    "dynamic": r"its rotary embedding \(dynamic\) depends on the length",
    "bloom": ".",
    "double": "float32 and float16",
}


@pytest.mark.parametrize("name", WHY)
def test_what_the_operator_does_not_compute_stays(name, tmp_path):
    model = lively(unlike(name)).eval()
    with pytest.raises(ExportError, match=f"is not what GroupQueryAttention computes: .*{WHY[name]}.*fused=False"):
        oftfx.export_onnx(model, tmp_path / "m.onnx", cache=True, fused=True)
    if name == "dynamic":  # torch cannot trace its code, fused or not
        return
    # Norms of a float64 Llama compute in float32: more than rounding by the bounds of float64.
    report = oftfx.export_onnx(model, tmp_path / "m.onnx", cache=True, fused=None, verify=name != "double")
    assert GQA not in report.operators
    assert report.attention.startswith("in plain operators: ")
    assert report.attention in str(report)


def test_options_that_do_not_fit(tiny_llama, tmp_path):
    model, path = tiny_llama(), tmp_path / "m.onnx"
    with pytest.raises(ExportError, match="fused=True is for decoders with their cache"):
        oftfx.export_onnx(model, path, {"input_ids": torch.zeros(1, 2, dtype=torch.long)}, fused=True)
    with pytest.raises(ExportError, match="dialect 'standard' has no such operator"):
        oftfx.export_onnx(model, path, cache=True, fused=True, dialect="standard")
    report = oftfx.export_onnx(model, path, cache=True, fused=None, dialect="standard", verify=False)
    assert not [o for o in report.operators if o.startswith("com.microsoft") or "Simplified" in o]
    with pytest.raises(ExportError, match="context_length=129 is over the config's max_position_embeddings=128"):
        oftfx.export_genai(model, tmp_path / "d", context_length=129, fused=True)
    report = oftfx.export_genai(model, tmp_path / "d", context_length=129, verify=False)
    assert "context_length=129" in report.attention
    assert json.loads((tmp_path / "d/genai_config.json").read_text())["search"]["past_present_share_buffer"] is False


def test_a_file_that_attends_wrongly_is_refused(tiny_llama, tmp_path, monkeypatch):
    real = attention._operator
    monkeypatch.setattr(attention, "_operator", lambda step, layer, query, scale: real(step, layer, query, 1.1 * scale))
    with pytest.raises(ExportError, match=r"output logits .*ONNX Runtime differs from torch.*self_attn"):
        oftfx.export_onnx(lively(tiny_llama()), tmp_path / "m.onnx", cache=True, fused=True)


def test_float16(tiny_llama, tmp_path):
    report = oftfx.export_onnx(lively(tiny_llama()).half(), tmp_path / "m.onnx", cache=True, fused=True)
    assert report.operators[GQA] == 2
    assert max(c.relative_error for c in report.checks) < 5e-3


@pytest.mark.needs("onnxruntime_genai")
@pytest.mark.parametrize("fused", [None, False])
def test_genai_generates_the_same_tokens(tenants, tmp_path, fused):  # noqa: F811
    """One adapter after another over the same files."""
    import onnxruntime_genai as genai

    report = oftfx.export_genai(tenants, tmp_path, adapters="swappable", fused=fused)
    settings = json.loads((tmp_path / "genai_config.json").read_text())
    assert settings["search"]["past_present_share_buffer"] is (fused is None)
    assert ("position_ids" in settings["model"]["decoder"]["inputs"]) is (fused is False)
    assert (report.attention == "GroupQueryAttention") is (fused is None)
    model = genai.Model(str(tmp_path))
    adapters = genai.Adapters(model)
    for name in ("a", "b"):
        adapters.load(str(tmp_path / f"{name}.onnx_adapter"), name)
    inputs = prompt(7)
    for name in (None, "a", "b", None):
        oftfx.set_adapter(tenants, name)
        assert generated(model, inputs, adapters, name) == torch_tokens(tenants, inputs)[0].tolist(), name
