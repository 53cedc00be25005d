"""Folds of checkpoint directories: what a fold in memory writes, to the bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError, FoldError, OftfxWarning
from tests.streaming.compare import ALL, adapter_for, assert_same, files, in_memory, note, tensors

pytestmark = [pytest.mark.needs("transformers"), pytest.mark.filterwarnings("ignore:.*other code reads:UserWarning")]


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rules", [ALL, {"*.embed_tokens": OFT(16)}, {"lm_head": OFT(16)}], ids=["all", "in", "out"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_model_in_shards(tiny_llama, tmp_path, dtype, rules, tied):
    tiny_llama(tie_word_embeddings=tied).to(dtype).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    adapter = adapter_for(load(tmp_path / "base"), tmp_path / "adapter", rules)
    before = files(tmp_path / "base")
    result = in_memory(load(tmp_path / "base"), adapter, tmp_path / "memory")
    report = oftfx.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    assert_same(tmp_path / "out", tmp_path / "memory")
    assert report.sites == result.report.sites
    assert {s.action for s in report} == {"folded"}
    assert note(tmp_path / "out")["folds"] == note(tmp_path / "memory")["folds"]
    assert note(tmp_path / "out")["checkpoint"] == note(tmp_path / "memory")["checkpoint"]
    assert files(tmp_path / "base") == before
    loaded = oftfx.load_folded(tmp_path / "out")
    assert loaded.config.tie_word_embeddings is False
    state = result.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in loaded.state_dict().items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "out").values())
    shards = sorted(p.name for p in (tmp_path / "base").glob("model-*"))
    assert sorted(p.name for p in (tmp_path / "out").glob("model-*")) == shards
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_what_does_not_change_is_the_same_file(tiny_llama, tmp_path):
    """Headers, order and bytes of a shard without a rotated layer."""
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="40KB")
    adapter = adapter_for(load(tmp_path / "base"), tmp_path / "adapter", {"*.0.*.q_proj": OFT(16)})
    oftfx.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    before, after = files(tmp_path / "base"), files(tmp_path / "out")
    changed = {n for n in before if before[n] != after[n]}
    assert len(changed) == 1, changed
    (shard,) = changed
    with (tmp_path / "base" / shard).open("rb") as a, (tmp_path / "out" / shard).open("rb") as b:
        length = int.from_bytes(a.read(8), "little")
        assert b.read(8 + length)[8:] == a.read(length)


@pytest.mark.parametrize("tied", [False, True])
def test_what_trains_whole(tiny_llama, tmp_path, tied):
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    rules, train = {"all-linear": OFT(8)}, ["model.norm", "model.embed_tokens"]
    adapter = adapter_for(load(tmp_path / "base"), tmp_path / "adapter", rules, train=train, train_bias="all")
    result = in_memory(load(tmp_path / "base"), adapter, tmp_path / "memory")
    oftfx.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    assert_same(tmp_path / "out", tmp_path / "memory")
    assert note(tmp_path / "out")["folds"] == note(tmp_path / "memory")["folds"]
    old, new = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    assert not torch.equal(old["model.norm.weight"], new["model.norm.weight"])
    assert not torch.equal(old["model.layers.0.self_attn.q_proj.bias"], new["model.layers.0.self_attn.q_proj.bias"])
    oftfx.load_folded(tmp_path / "out").load_state_dict(result.model.state_dict())


def test_an_adapter_of_peft(tiny_llama, ids, tmp_path):
    peft = pytest.importorskip("peft")
    tiny_llama().save_pretrained(tmp_path / "base")
    config = peft.OFTConfig(target_modules=["q_proj", "down_proj"], oft_block_size=16, use_cayley_neumann=True)
    model = peft.get_peft_model(load(tmp_path / "base"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "oft_R" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    wanted = model.eval()(**ids()).logits
    oftfx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    in_memory(load(tmp_path / "base"), tmp_path / "adapter", tmp_path / "memory")
    assert_same(tmp_path / "out", tmp_path / "memory")
    assert torch.allclose(oftfx.load_folded(tmp_path / "out")(**ids()).logits, wanted, atol=1e-5)


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(3)
    config = MixtralConfig(
        vocab_size=131, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore::oftfx.errors.OftfxWarning")
@pytest.mark.parametrize("each", [False, True])
def test_experts_that_the_checkpoint_has_one_by_one(tmp_path, each):
    mixtral().save_pretrained(tmp_path / "base", max_shard_size="30KB")
    assert any("experts.2.w3" in n for n in tensors(tmp_path / "base"))
    spec = OFT(8, experts="each") if each else OFT(8)
    rules = {"*.experts.*": spec, "*.q_proj": OFT(8), "*.gate": OFT(8)}
    adapter = adapter_for(load(tmp_path / "base"), tmp_path / "adapter", rules)
    result = in_memory(load(tmp_path / "base"), adapter, tmp_path / "memory")
    assert any("experts" in s.fqn for s in result.report)
    report = oftfx.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    assert_same(tmp_path / "out", tmp_path / "memory")
    assert report.sites == result.report.sites
    oftfx.load_folded(tmp_path / "out")


def test_old_names_and_a_prefix(tiny_bert, tmp_path):
    """A base model's file for a model with a head, and LayerNorm's names of long ago."""
    tiny_bert().save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    state = load_file(file)
    renamed = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in state.items()
    }
    save_file(renamed, file, metadata={"format": "pt"})
    from transformers import BertForSequenceClassification

    base = BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    adapter = adapter_for(base, tmp_path / "adapter", {"*.query": OFT(16), "*.dense": OFT(16)}, train_bias="all")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    result = in_memory(base, adapter, tmp_path / "memory")
    oftfx.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    assert set(tensors(tmp_path / "out")) == set(renamed)
    loaded = oftfx.load_folded(tmp_path / "out")
    wanted = result.model.state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in loaded.state_dict().items())


def test_dtypes_that_torch_does_not_know_are_copied(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    extra = bytes(range(7))
    header["strange"] = {"dtype": "F7_NEW", "shape": [8], "data_offsets": [len(body), len(body) + 7]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body + extra)
    adapter = adapter_for(tiny_llama(), tmp_path / "adapter", {"*.q_proj": OFT(16)})
    oftfx.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "out")
    made = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(made[:8], "little")
    begin, end = json.loads(made[8 : 8 + length])["strange"]["data_offsets"]
    assert made[8 + length + begin : 8 + length + end] == extra


@pytest.fixture
def parts(tiny_llama, tmp_path):
    """A base and an adapter, as arguments."""
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="40KB")
    adapter = adapter_for(tiny_llama(), tmp_path / "adapter", {"*.q_proj": OFT(16)})
    return tmp_path / "base", adapter, tmp_path / "out"


def damage_shard(base, adapter):
    file = sorted(base.glob("model-*"))[2]
    file.write_bytes(file.read_bytes()[:-100])


def lose_shard(base, adapter):
    sorted(base.glob("model-*"))[1].unlink()


def lose_tensor(base, adapter):
    index = base / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    name = "model.layers.1.self_attn.q_proj.weight"
    file = base / said["weight_map"].pop(name)
    state = load_file(file)
    del state[name]
    save_file(state, file, metadata={"format": "pt"})
    index.write_text(json.dumps(said))


def other_index(base, adapter):
    index = base / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    said["weight_map"]["nothing.weight"] = next(iter(said["weight_map"].values()))
    index.write_text(json.dumps(said))


def other_shape(base, adapter):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))


def other_class(base, adapter):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["SomebodysModel"]}))


def no_weights(base, adapter):
    for file in base.glob("model*"):
        file.unlink()
    (base / "pytorch_model.bin").write_bytes(b"")


def rotations_there(base, adapter):
    (base / "oftfx_rotations.safetensors").write_bytes(b"")


WRONG = {
    damage_shard: (
        FoldError,
        r"model-00003-of-\d+.safetensors is damaged or not a safetensors file: .* fetch it again",
    ),
    lose_shard: (FoldError, r"model-00002-of-\d+.safetensors is missing, which model.safetensors.index.json names"),
    lose_tensor: (FoldError, r"there is no model\.layers\.1\.self_attn\.q_proj\.weight, which a LlamaForCausalLM has"),
    other_index: (FoldError, r"names nothing.weight in .*, but no file has it; is it complete"),
    other_shape: (FoldError, r"mlp\.\w+\.weight has shape \[\d+, \d+\], a LlamaForCausalLM of this config has"),
    other_class: (FoldError, r"architectures names SomebodysModel, which is no class of transformers"),
    no_weights: (FoldError, r"model.safetensors is missing \(there: pytorch_model.bin\)"),
    rotations_there: (FoldError, r"has rotations in front of its weights .* load it with oftfx.load_folded"),
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_what_is_wrong_is_said_before_a_byte_is_written(parts, wrong):
    wrong(*parts[:2])
    kind, message = WRONG[wrong]
    with pytest.raises(kind, match=message):
        oftfx.fold_checkpoint(*parts)
    assert not parts[2].exists()


def test_an_adapter_of_another_model(parts, tiny_llama, tmp_path):
    base, _, out = parts
    other = adapter_for(tiny_llama(num_hidden_layers=3), tmp_path / "other", {"*.q_proj": OFT(16)})
    with pytest.raises(AdapterError, match=r"rotates model\.layers\.2\.self_attn\.q_proj, which is no layer"):
        oftfx.fold_checkpoint(base, other, out)
    wide = adapter_for(tiny_llama(hidden_size=96), tmp_path / "wide", {"*.q_proj": OFT(16)})
    with pytest.raises(AdapterError, match="does not fit in_features 64"):
        oftfx.fold_checkpoint(base, wide, out)
    assert not out.exists()


def test_policies_that_need_something_say_so(parts):
    base, adapter, out = parts
    with pytest.raises(FoldError, match="got 'other'. Load the model and use oftfx.fold for a Budget and distil"):
        oftfx.fold_checkpoint(base, adapter, out, quantized="other")
    with pytest.raises(FoldError, match="policy 'calibrate' needs calibration="):
        oftfx.fold_checkpoint(base, adapter, out, quantized="calibrate")
    with pytest.raises(FoldError, match="policy 'reference' needs reference="):
        oftfx.fold_checkpoint(base, adapter, out, quantized="reference")


def test_places_that_are_taken(parts, tmp_path):
    base, adapter, out = parts
    for place in (base, base / "inside", tmp_path):
        with pytest.raises(FoldError, match="one directory, or one is in the other"):
            oftfx.fold_checkpoint(base, adapter, place)
    shutil.copytree(base, tmp_path / "theirs")
    with pytest.raises(FoldError, match=r"theirs holds a checkpoint that .* did not write"):
        oftfx.fold_checkpoint(base, adapter, tmp_path / "theirs")
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    oftfx.fold_checkpoint(base, adapter, out)
    first = files(out)
    with pytest.raises(FoldError, match=r"holds an earlier result; overwrite=True \(--overwrite\) replaces it"):
        oftfx.fold_checkpoint(base, adapter, out)
    assert files(out) == first
    other = tmp_path / "single"
    load(base).save_pretrained(other)
    oftfx.fold_checkpoint(other, adapter, out, overwrite=True)
    assert not [*out.glob("model-*")]
    assert (out / "mine.txt").read_text() == "kept"
    oftfx.load_folded(out)


def test_what_is_not_copied_is_said(parts):
    base, adapter, out = parts
    (base / "README.md").write_text("words")
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"other weights")
    (base / "onnx").mkdir()
    with pytest.warns(OftfxWarning, match="not copied: onnx/, pytorch_model.bin"):
        oftfx.fold_checkpoint(base, adapter, out)
    assert (out / "README.md").read_text() == "words"
    assert (out / "tokenizer.json").exists()
    assert not (out / "onnx").exists()


def test_progress_is_of_bytes(parts):
    base, adapter, out = parts
    seen = []
    oftfx.fold_checkpoint(base, adapter, out, progress=lambda done, total: seen.append((done, total)))
    total = sum(t.nbytes for t in tensors(base).values())
    assert seen[0] == (0, total)
    assert seen[-1][0] == total
    assert [d for d, _ in seen] == sorted(d for d, _ in seen) or len(seen) > 2


def test_a_second_fold_remembers_the_first(parts, tmp_path):
    base, adapter, out = parts
    oftfx.fold_checkpoint(base, adapter, out)
    oftfx.fold_checkpoint(out, adapter, tmp_path / "second", name="again")
    assert [f["adapters"].keys() for f in note(tmp_path / "second")["folds"]] == [{"default"}, {"again"}]
    first, second = (note(p)["folds"][-1]["adapters"].values() for p in (out, tmp_path / "second"))
    assert [*first] == [*second]


def test_the_sums_are_those_of_the_files(parts):
    import hashlib

    base, adapter, out = parts
    oftfx.fold_checkpoint(base, adapter, out)
    said = json.loads((out / "oftfx_sha256.json").read_text())
    assert said["tensors"] == {
        n: hashlib.sha256(t.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for n, t in tensors(out).items()
    }
    assert said["sizes"] == {p.name: p.stat().st_size for p in out.glob("model-*")}
    assert all(said["files"][n] == hashlib.sha256((out / n).read_bytes()).hexdigest() for n in said["files"])
    assert "config.json" in said["files"]
