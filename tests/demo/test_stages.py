"""The whole job on a tiny model: what an interruption leaves is taken up, and nothing that is done is done again."""

import json
from types import SimpleNamespace

import pytest
import torch

import oftfx
from oftfx.demo import job, smollm
from oftfx.demo.job import Job, Size
from oftfx.demo.job_table import table_rows
from oftfx.demo.ocr_job import silent
from tests.reference import rel

pytestmark = pytest.mark.needs("transformers", "bitsandbytes", "onnx", "onnxruntime", "onnxscript", "rich")

SIZE = Size(steps=2, aware_steps=3, held_out=4, calibration=3, rounds=1)
NAMES = [
    "float32 base",
    "NF4 base",
    "NF4 + adapter",
    *(f"folded: {policy}" for policy in job.FOLDS),
    "ONNX folded (float)",
    "ONNX unfolded (NF4)",
]


class Tokenizer:
    eos_token_id = 1

    def __call__(self, text, return_tensors=None):
        ids = [5 + ord(c) % 126 for c in text]
        if return_tensors is None:
            return {"input_ids": ids}
        return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}

    def decode(self, ids, **_):
        return " ".join(map(str, ids.tolist()))


class Stop(Exception):
    pass


@pytest.fixture
def world(tiny_llama, monkeypatch, tmp_path):
    """A job on a tiny model, what it calls and which torch models it measures."""
    calls = []

    def counted(owner, name, note=lambda *a, **k: ""):
        real = getattr(owner, name)

        def call(*arguments, **settings):
            calls.append(" ".join([name, note(*arguments, **settings)]).strip())
            return real(*arguments, **settings)

        monkeypatch.setattr(owner, name, call)

    # The corpus and the model are the only things that are not the job's own.
    sizes = {"intermediate_size": 128, "tie_word_embeddings": True}  # blocks of 64 do not cross rows, as in SmolLM2
    monkeypatch.setattr(smollm, "load", lambda: (tiny_llama(**sizes), Tokenizer()))
    monkeypatch.setattr(
        job.text, "read", lambda split: [f"{split} {i} " + "the quick brown fox " * 12 for i in range(9)]
    )
    models, in_torch = [], job.ppl.in_torch
    monkeypatch.setattr(job.ppl, "in_torch", lambda model: models.append(model) or in_torch(model))
    counted(smollm, "load")
    counted(job.ppl, "perplexity")
    counted(oftfx, "export_onnx")
    counted(
        oftfx,
        "fold",
        lambda model, *, calibration, quantized="as trained", **_: f"{quantized} {len(calibration or ())}",
    )
    return SimpleNamespace(
        calls=calls,
        models=models,
        job=lambda: Job(tmp_path, SIZE, lambda _: None, silent),
        folder=tmp_path,
        results=lambda: json.loads((tmp_path / "results.json").read_text()),
    )


@pytest.fixture
def timed(monkeypatch):
    """The models of every timing stage as their outputs; the first one is interrupted."""
    outputs = []

    def ratios(functions, reference, *, rounds, report):
        outputs.append({name: f() for name, f in functions.items()})
        if len(outputs) == 1:
            raise Stop
        return real(functions, reference, rounds=rounds, report=report)

    real = job.ratios
    monkeypatch.setattr(job, "ratios", ratios)
    return outputs


def check_sharing(models):
    """All are in memory at the end, so no tensor that a fold leaves alone may be there twice."""
    floats, codes = {}, {}
    for model in models:
        for path, tensor in model.named_parameters():
            (codes if tensor.dtype == torch.uint8 else floats).setdefault(path, set()).add(tensor.data_ptr())
    assert len(floats["model.embed_tokens.weight"]) == 1
    linear = "model.layers.1.mlp.down_proj.weight"
    assert len(floats[linear]) == 2  # the float base and the float fold
    assert len(codes[linear]) == 3 + 1  # the base (also adapted, and kept), requantized, calibrated, trained on


def test_an_interrupted_timing_finds_every_model_as_it_was(world, timed):
    with pytest.raises(Stop):
        world.job().run()
    folds = ["fold keep 1", "fold float 1", "fold requantize 1", "fold calibrate 1", "fold as trained 1"]
    assert sorted(world.calls) == sorted(["load", *folds, *["perplexity"] * 10, *["export_onnx"] * 2])
    check_sharing(world.models)
    world.calls.clear()
    results = world.job().run()
    # Three folds are made again, without measuring; calibrated ones come from their files.
    assert sorted(world.calls) == ["fold float 0", "fold keep 0", "fold requantize 0", "load"]
    first, second = timed
    assert list(first) == list(second) == list(results["rows"]) == NAMES
    for name in NAMES:
        assert torch.equal(first[name], second[name]), name
    # They are the models that their names say.
    base, adapted = first["NF4 base"], first["NF4 + adapter"]
    assert rel(base, first["float32 base"]) > 1e-2
    assert rel(adapted, base) > 1e-4
    for name in ("folded: keep", "folded: float", "ONNX folded (float)", "ONNX unfolded (NF4)"):
        assert rel(first[name], adapted) < 1e-5
    assert not torch.equal(first["folded: calibrate"], first["folded: requantize"])
    assert 0 < rel(first[f"folded: {job.TRAINED}"], first["folded: calibrate"]) < 1e-2

    assert results["time_ratios"].keys() == set(NAMES)
    assert results["time_ratios"]["float32 base"] == 1.0
    assert min(results["time_ratios"].values()) > 0
    assert not any("ms" in row for row in results["rows"].values())
    assert len(table_rows(results)) == 10
    world.calls.clear()
    assert world.job().run() == results
    assert world.calls == []


def test_a_fold_that_was_interrupted_is_done_again_and_those_before_it_are_not(world, monkeypatch):
    fold = oftfx.fold

    def interrupted(model, *, quantized=None, **settings):
        if quantized == "calibrate":
            raise Stop
        return fold(model, quantized=quantized, **settings)

    def stop(*_):
        raise Stop

    monkeypatch.setattr(job, "_greedy", stop)  # the stage after the folds
    with monkeypatch.context() as patch:
        patch.setattr(oftfx, "fold", interrupted)
        with pytest.raises(Stop):
            world.job().run()
    assert world.results()["folds"].keys() == {"keep", "float", "requantize"}
    assert not (world.folder / "calibrated.safetensors").exists()
    world.calls.clear()
    with pytest.raises(Stop):
        world.job().run()
    assert world.calls == ["load", "fold calibrate 1", "perplexity", "fold as trained 1", "perplexity"]
    assert all(f["output_error"] is not None for f in world.results()["folds"].values())
    stages = world.results()["stage_seconds"]
    assert {f"fold: {policy}" for policy in job.FOLDS} < stages.keys()


def test_codes_and_scales_come_back_bit_for_bit(tiny_llama, ids, tmp_path):
    base, other = (
        smollm.hold_still(smollm.quantize_nf4(tiny_llama(intermediate_size=128, initializer_range=size)))
        for size in (0.02, 0.05)
    )
    before, expected = base(**ids()).logits, other(**ids()).logits
    smollm.save_nf4(other, tmp_path / "codes.safetensors")
    loaded = smollm.load_nf4(base, tmp_path / "codes.safetensors")
    assert torch.equal(base(**ids()).logits, before)
    for name, layer in loaded.named_modules():
        if type(layer).__name__ == "Linear4bit":
            wanted = other.get_submodule(name)
            assert torch.equal(layer.weight, wanted.weight)
            assert torch.equal(layer.quant_state.absmax, wanted.weight.quant_state.absmax)
    loaded.load_state_dict({k: v for k, v in other.state_dict().items() if "_proj.weight" not in k}, strict=False)
    assert torch.equal(loaded(**ids()).logits, expected)
