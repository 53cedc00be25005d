"""Folded models as directories: what comes back computes what was saved, for every policy; a mixture is refused."""

import copy
import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

import oftfx
from oftfx import OFT, Budget
from oftfx.adapter.fixed_rotations import SavesRotations
from oftfx.errors import AdapterFileError, FoldError, OftfxWarning
from oftfx.folding.note import fold_notes
from oftfx.model.structure import structural_copy
from tests.ecosystem.twin import dense_twin
from tests.quantized import inputs, network, original, rotated, run
from tests.reference import randomize, rel
from tests.test_files import Steps

NF4 = pytest.mark.needs("transformers", "bitsandbytes", "accelerate")
NOTE, ROTATIONS = "oftfx_fold.json", "oftfx_rotations.safetensors"


@pytest.fixture
def nf4(tiny_llama, tmp_path):
    """An NF4 model as transformers loads it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(hidden_size=128, intermediate_size=192).save_pretrained(tmp_path / "float")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config).eval()


@pytest.fixture
def kept(nf4):
    """The result of the default fold of it."""
    return fold(nf4, "keep")


def fold(base, policy, **options):
    model = randomize(oftfx.transform(base, {"all-linear": OFT(16, share_input=True)}), std=0.1).eval()
    return oftfx.fold(model, quantized=policy, **options)


def logits(model, ids):
    with torch.no_grad():
        return model(**ids()).logits


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def by_place(site):
    """Each policy somewhere."""
    return {"q_proj": "keep", "k_proj": "float", "v_proj": "requantize"}.get(site.fqn.rpartition(".")[2], "keep")


POLICIES = {
    "keep": ("keep", {"kept"}),
    "float": ("float", {"dequantized"}),
    "requantize": ("requantize", {"requantized"}),
    "calibrate": ("calibrate", {"calibrated"}),
    "reference": ("reference", {"from reference"}),
    "budget": (Budget(0.092, ("requantize", "keep")), {"requantized", "kept"}),
    "budget, float": (Budget(0.092, ("requantize", "float")), {"requantized", "dequantized"}),
    "each its own": (by_place, {"kept", "dequantized", "requantized"}),
}


@NF4
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_comes_back(nf4, ids, tmp_path, policy):
    chosen, actions = POLICIES[policy]
    options = {"calibration": [ids(seed=7)]} if policy == "calibrate" else {}
    if policy == "reference":
        options["reference"] = tmp_path / "float"
    result = fold(nf4, chosen, **options)
    assert {s.action for s in result.report} == actions
    assert result.save(tmp_path / "folded") == tmp_path / "folded"
    again = oftfx.load_folded(tmp_path / "folded", dtype=torch.float32)
    assert type(again) is type(nf4)
    assert not again.training
    assert torch.equal(logits(again, ids), logits(result.model, ids))
    kept_some = "kept" in actions
    assert (tmp_path / "folded" / ROTATIONS).exists() is kept_some
    config = json.loads((tmp_path / "folded" / "config.json").read_text())
    assert config.get("oftfx_rotations") == (ROTATIONS if kept_some else None)
    assert fold_notes(again) == fold_notes(result.model)
    note = json.loads((tmp_path / "folded" / NOTE).read_text())
    assert note["report"] == json.loads(result.report.to_json())
    assert sorted(note["files"]) == sorted(contents(tmp_path / "folded"))
    assert not hasattr(result.model.config, "oftfx_rotations")


@pytest.mark.needs("transformers")
@pytest.mark.filterwarnings("ignore::oftfx.errors.OftfxWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_a_float_model_comes_back(tiny_llama, ids, tmp_path, tied):
    base = tiny_llama(tie_word_embeddings=tied)
    model = randomize(oftfx.transform(base, {"all-linear": OFT(16), "lm_head": OFT(16)}), std=0.1)
    oftfx.fold(model).save(tmp_path)
    again = oftfx.load_folded(tmp_path)
    assert rel(logits(again, ids), dense_twin(base, model)(**ids()).logits) < 1e-5
    assert "oftfx" not in (tmp_path / "config.json").read_text()


@NF4
def test_a_bare_loader_does_not_see_the_rotations(kept, nf4, ids, tmp_path):
    """Why there is `load_folded`: the very fault that it is for."""
    kept.save(tmp_path / "folded")
    bare = type(nf4).from_pretrained(tmp_path / "folded").eval()
    assert torch.equal(logits(bare, ids), logits(nf4, ids))
    assert rel(logits(kept.model, ids), logits(nf4, ids)) > 0.1
    assert bare.config.oftfx_rotations == ROTATIONS
    bare = type(nf4).from_pretrained(tmp_path / "folded").eval()
    loaded = oftfx.load_folded(tmp_path / "folded", bare)
    assert loaded is bare
    assert torch.equal(logits(loaded, ids), logits(kept.model, ids))
    assert not hasattr(bare.config, "oftfx_rotations")


@NF4
def test_a_bare_save_writes_the_rotations_and_says_so(kept, ids, tmp_path):
    wanted = logits(kept.model, ids)
    copies = {
        "itself": kept.model,
        "deepcopy": copy.deepcopy(kept.model),
        "structural copy": structural_copy(kept.model),
    }
    for name, model in copies.items():
        assert vars(model)["save_pretrained"].model is model
        with pytest.warns(OftfxWarning, match=r"from_pretrained alone drops. Load it with oftfx.load_folded\('.*'\)"):
            model.save_pretrained(tmp_path / name)
        again = oftfx.load_rotations(type(model).from_pretrained(tmp_path / name).eval(), tmp_path / name)
        assert torch.equal(logits(again, ids), wanted)
        assert json.loads((tmp_path / name / "config.json").read_text())["oftfx_rotations"] == ROTATIONS


@NF4
def test_a_model_that_was_loaded_is_folded_and_saved_again(kept, nf4, ids, tmp_path):
    """transformers itself cannot save what it read from a file of four bits in its first format."""
    kept.save(tmp_path / "first")
    loaded = oftfx.load_folded(tmp_path / "first")
    model = randomize(oftfx.transform(loaded, {"*.q_proj": OFT(16)}), std=0.1)  # behind the rotations that are there
    second = oftfx.fold(model)
    assert rel(logits(second.model, ids), logits(kept.model, ids)) > 1e-3
    second.save(tmp_path / "second")
    again = oftfx.load_folded(tmp_path / "second")
    assert torch.equal(logits(again, ids), logits(second.model, ids))
    assert [n["adapters"].keys() for n in fold_notes(again)] == [{"default"}, {"default"}]


@NF4
def test_a_layer_that_its_runtime_has_repacked_is_named(kept, nf4, ids, tmp_path):
    kept.save(tmp_path / "folded")
    bare = type(nf4).from_pretrained(tmp_path / "folded").eval()
    logits(bare, ids)
    packed = any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in bare.modules() if is4(m))
    expected = r"q_proj: an earlier eval forward had repacked this weight .* So it is with 13 more layers"
    with pytest.warns(OftfxWarning, match=expected) if packed else nullcontext():  # a matter of the processor
        oftfx.load_folded(tmp_path / "folded", bare)


def is4(module):
    return type(module).__name__ == "Linear4bit"


@NF4
def test_sharded_with_a_state_dict_or_by_another_process(kept, ids, tmp_path):
    with pytest.warns(OftfxWarning, match="beside the checkpoint"):
        kept.model.save_pretrained(tmp_path / "a", max_shard_size="100KB", state_dict=kept.model.state_dict())
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 2
    again = oftfx.load_rotations(type(kept.model).from_pretrained(tmp_path / "a").eval(), tmp_path / "a")
    assert torch.equal(logits(again, ids), logits(kept.model, ids))
    with pytest.raises(FoldError, match="push_to_hub=True.* uploads before the rotations"):
        kept.model.save_pretrained(tmp_path / "b", push_to_hub=True)
    assert not (tmp_path / "b").exists()
    with pytest.raises(AdapterFileError, match=f"there is no {NOTE}.*load it with from_pretrained and"):
        oftfx.load_folded(tmp_path / "a")


@NF4
def test_unfolded_models_save_as_they_did(nf4, kept, ids, tmp_path):
    assert isinstance(vars(kept.model)["save_pretrained"], SavesRotations)
    assert "save_pretrained" not in vars(nf4)
    assert "save_pretrained" not in vars(oftfx.unfold(kept))
    inplace = fold(structural_copy(nf4), "keep", inplace=True, undo=True)
    assert "save_pretrained" in vars(inplace.model)
    assert "save_pretrained" not in vars(oftfx.unfold(inplace))
    assert "save_pretrained" not in vars(fold(nf4, "requantize").model)
    second = oftfx.transform(kept.model, {"*.q_proj": OFT(16)})  # a new adapter behind the fixed rotations
    randomize(second, std=0.1)
    again = oftfx.fold(second, quantized="float").model
    assert not any(map(is4, again.modules()))
    assert "save_pretrained" not in vars(again)


@NF4
def test_a_trainers_checkpoint_has_the_rotations(kept, ids, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = randomize(oftfx.transform(kept.model, {"*.q_proj": OFT(16)}), std=0.1)
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True))
    with pytest.warns(OftfxWarning, match="beside the checkpoint"):
        trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / ROTATIONS).exists()


@NF4
def test_files_of_two_saves_are_refused(kept, nf4, tmp_path, ids):
    kept.save(tmp_path / "a")
    fold(nf4, "requantize").save(tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "c")
    with pytest.raises(AdapterFileError, match=f"the checkpoint is not what {NOTE} was written with"):
        oftfx.load_folded(tmp_path / "c")
    plain = type(nf4).from_pretrained(tmp_path / "c")
    with pytest.raises(AdapterFileError, match="was written for other weights than those beside it"):
        oftfx.load_rotations(plain, tmp_path / "c")
    shutil.copy(tmp_path / "a" / "model.safetensors", tmp_path / "c")
    other = oftfx.fold(randomize(oftfx.transform(nf4, {"all-linear": OFT(16)}), std=0.2, seed=3), quantized="keep")
    oftfx.save_rotations(other.model, tmp_path / "c")
    with pytest.raises(AdapterFileError, match=f"{ROTATIONS} is not what {NOTE} was written with"):
        oftfx.load_folded(tmp_path / "c")
    (tmp_path / "a" / ROTATIONS).unlink()
    with pytest.raises(AdapterFileError, match=f"{ROTATIONS} is missing, which {NOTE} names"):
        oftfx.load_folded(tmp_path / "a")


@NF4
def test_a_checkpoint_may_be_cut_and_saved_by_a_loader_that_knows_no_rotations(kept, nf4, ids, tmp_path):
    kept.save(tmp_path / "a")
    again = type(nf4).from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b", max_shard_size="100KB", save_original_format=False)
    assert not any(".oft." in n for f in (tmp_path / "b").glob("model-*") for n in load_file(f))
    shutil.copy(tmp_path / "a" / ROTATIONS, tmp_path / "b")
    loaded = oftfx.load_rotations(type(nf4).from_pretrained(tmp_path / "b").eval(), tmp_path / "b")
    assert torch.equal(logits(loaded, ids), logits(kept.model, ids))


@pytest.mark.needs("transformers")
def test_directories_of_others_are_not_touched(tiny_llama, tmp_path):
    result = oftfx.fold(randomize(oftfx.transform(tiny_llama(), {"all-linear": OFT(16)})))
    tiny_llama().save_pretrained(tmp_path / "base")
    before = contents(tmp_path / "base")
    with pytest.raises(FoldError, match=r"base holds a checkpoint that FoldResult.save did not write"):
        result.save(tmp_path / "base")
    assert contents(tmp_path / "base") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("a user's")
    result.save(tmp_path / "mine")
    first = contents(tmp_path / "mine")
    result.save(tmp_path / "mine")
    assert contents(tmp_path / "mine") == first
    assert first["README.md"] == b"a user's"
    (tmp_path / "file").write_text("")
    with pytest.raises(FoldError, match="file: cannot be written to: .* a file is where a directory is wanted"):
        result.save(tmp_path / "file")


@pytest.mark.needs("transformers")
def test_shards_of_an_earlier_save_go(tiny_llama, tmp_path, monkeypatch, ids):
    base = tiny_llama()
    result = oftfx.fold(randomize(oftfx.transform(base, {"all-linear": OFT(16)})))
    with monkeypatch.context() as patch:
        real = type(base).save_pretrained
        patch.setattr(type(base), "save_pretrained", lambda self, path: real(self, path, max_shard_size="40KB"))
        result.save(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(oftfx.load_folded(tmp_path), ids), logits(result.model, ids))
    result.save(tmp_path)
    assert sorted(contents(tmp_path)) == sorted(["config.json", "generation_config.json", "model.safetensors", NOTE])
    assert torch.equal(logits(oftfx.load_folded(tmp_path), ids), logits(result.model, ids))


@NF4
def test_what_no_loader_would_bring_back_is_refused(tiny_llama, tmp_path):
    from oftfx.formats.bnb4 import make_linear4bit

    base = tiny_llama()
    base.model.layers[0].mlp.up_proj = make_linear4bit(base.model.layers[0].mlp.up_proj)
    with pytest.raises(FoldError, match=r"layers\.0\.mlp\.up_proj is quantized, but the configuration .* does not say"):
        fold(base, "keep").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


KINDS = [pytest.param(k, marks=pytest.mark.needs("bitsandbytes")) for k in ("bnb4", "bnb8")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["keep", "float", "requantize", "each its own"])
def test_plain_modules_are_filled(tmp_path, kind, policy):
    def each(site):
        return {"q": "keep", "k": "float"}.get(site.fqn.rpartition(".")[2], "requantize")

    result = oftfx.fold(rotated(share=policy == "keep", kind=kind), quantized=each if " " in policy else policy)
    result.save(tmp_path)
    torch.manual_seed(77)
    fresh = network(kind)
    for parameter in fresh.parameters():
        if parameter.is_floating_point():
            parameter.data.mul_(0.5)
    assert oftfx.load_folded(tmp_path, fresh) is fresh
    assert torch.equal(run(fresh, inputs()), run(result.model, inputs()))
    with pytest.raises(AdapterFileError, match=r"make one and pass it, oftfx.load_folded\(directory, model\)"):
        oftfx.load_folded(tmp_path)


def test_a_plain_module_that_does_not_fit_is_not_changed(tmp_path):
    result = oftfx.fold(randomize(oftfx.transform(original(), {"blocks.*": OFT(16)})))
    result.save(tmp_path)
    other = original().double()
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(AdapterFileError, match=r"float32 in the file, .* torch.float64 in the model"):
        oftfx.load_folded(tmp_path, other)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    with pytest.raises(AdapterFileError, match="is only in the (file|model); is it another model"):
        oftfx.load_folded(tmp_path, nn.Sequential(nn.Linear(3, 3)))
    assert torch.equal(run(oftfx.load_folded(tmp_path, original()), inputs()), run(result.model, inputs()))


@pytest.mark.parametrize(("version", "advice"), [(2, "A newer oftfx wrote it"), (0, "An older one wrote it")])
def test_another_version_is_named(tmp_path, version, advice):
    oftfx.fold(randomize(oftfx.transform(nn.Sequential(nn.Linear(8, 4)), {"0": OFT(4)}))).save(tmp_path)
    note = json.loads((tmp_path / NOTE).read_text())
    (tmp_path / NOTE).write_text(json.dumps({**note, "oftfx_fold": version}))
    with pytest.raises(AdapterFileError, match=rf"{NOTE} has version {version}; this oftfx reads version 1\. {advice}"):
        oftfx.load_folded(tmp_path, nn.Sequential(nn.Linear(8, 4)))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"oftfx_fold": 1}', '{"oftfx_fold": 1, "files": 3}'])
def test_damaged_notes_are_refused(tmp_path, text):
    (tmp_path / NOTE).write_text(text)
    with pytest.raises(AdapterFileError, match=f"{NOTE} is (not|damaged)"):
        oftfx.load_folded(tmp_path)


# -- interrupted ------------------------------------------------------------------------------


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))


def result_of(seed):
    return oftfx.fold(randomize(oftfx.transform(plain(), {"*": OFT(4)}), std=0.3, seed=seed))


X = torch.linspace(-1, 1, 36).reshape(3, 12)


def test_a_full_disk_at_every_step_leaves_the_model_that_was_there(tmp_path, monkeypatch):
    first, second = result_of(1), result_of(2)
    first.save(tmp_path)
    before = contents(tmp_path)

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    steps = Steps(monkeypatch, full)
    second.save(tmp_path)
    total = steps.count
    first.save(tmp_path)
    for steps.at in range(total):
        steps.count = 0
        with pytest.raises(FoldError, match="No space left on device.*make room there"):
            second.save(tmp_path)
        assert contents(tmp_path) == before
        assert len(list(tmp_path.iterdir())) == len(before)
    assert total > 10


def test_safetensors_own_error_on_a_full_disk_names_the_place(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(
        FoldError, match=f"{tmp_path}/a: cannot be written to: .*No space left on device.*make room there"
    ):
        result_of(1).save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, sys
from pathlib import Path
import pytest
from tests.adapter.test_folded import result_of
from tests.test_files import Steps
result = result_of(2)
steps = Steps(pytest.MonkeyPatch(), lambda: os._exit(9))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    if os.fork() == 0:
        steps.at = int(folder.name)
        result.save(folder)
        os._exit(0)
    os.wait()
"""


@pytest.mark.filterwarnings("ignore:.*a save was killed while")
def test_a_process_killed_at_every_step_leaves_one_model(tmp_path):
    first, second = result_of(1), result_of(2)
    for at in range(25):
        first.save(tmp_path / str(at))
    subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=True, timeout=300)
    seen = set()
    for folder in tmp_path.iterdir():
        begun = not (folder / NOTE).exists()
        output = oftfx.load_folded(folder, plain())(X)
        is_new = torch.equal(output, second.model(X))
        assert is_new or (torch.equal(output, first.model(X)) and not begun)
        seen.add("ended by its reader" if begun else "new" if is_new else "old")
    assert seen == {"old", "new", "ended by its reader"}


@NF4
def test_a_model_with_rotations_is_pickled_with_what_saves_them(kept, ids, tmp_path):
    again = pickle.loads(pickle.dumps(kept.model))
    assert vars(again)["save_pretrained"].model is again
    with pytest.warns(OftfxWarning, match="beside the checkpoint"):
        again.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / ROTATIONS).exists()


def test_a_damaged_checkpoint_is_refused(tmp_path):
    result_of(1).save(tmp_path)
    file = tmp_path / "model.safetensors"
    for data in (b"", b"junk" * 9, (1 << 40).to_bytes(8, "little") + b"{}"):
        file.write_bytes(data)
        with pytest.raises(AdapterFileError, match=r"model.safetensors is damaged or not a safetensors file"):
            oftfx.load_folded(tmp_path, plain())
    tensors = {"0.weight": torch.zeros(8, 12)}
    save_file(tensors, file)
    with pytest.raises(AdapterFileError, match="the checkpoint is not what"):
        oftfx.load_folded(tmp_path, plain())
