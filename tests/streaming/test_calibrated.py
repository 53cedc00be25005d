"""Layers of checkpoint directories calibrated with few of them in memory: what a fold in memory writes, to the bit."""

import json

import pytest
import torch
import torch.nn as nn
from safetensors.torch import save_file

import oftfx
from oftfx import OFT
from oftfx.errors import FoldError, OftfxWarning
from oftfx.folding import spill
from oftfx.folding.inputs import digest_of
from oftfx.streaming import job
from oftfx.streaming.transformers_loader import make_buffers
from tests.ecosystem.test_gptq_awq import checkpoint  # noqa: F401  (a fixture)
from tests.ecosystem.test_quantized_checkpoints import CASES, SIZES
from tests.streaming.compare import adapter_for, assert_same, files, in_memory, note, sums
from tests.streaming.test_quantized import CHOSEN, CPU, RULES, assert_loads_as, assert_same_lines, load

pytestmark = [
    pytest.mark.needs("transformers", "accelerate"),
    pytest.mark.filterwarnings("ignore:.*kernels.*"),
    pytest.mark.filterwarnings("ignore::oftfx.errors.OftfxWarning"),
]


def data(count=9, length=24):
    numbers = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 32, (2, length), generator=numbers)} for _ in range(count)]


def both(base, adapter, tmp_path, *, place="memory", loading=CPU, **options):
    """The fold of files and the one in memory, and their reports."""
    options = {"quantized": "calibrate", "calibration": data(), **options}
    result = in_memory(load(base, **loading), adapter, tmp_path / "memory", **options)
    before = files(base)
    report = oftfx.fold_checkpoint(base, adapter, tmp_path / "out", hidden_states=place, **options)
    assert files(base) == before
    return report, result.report


@pytest.mark.parametrize("case", [pytest.param(n, marks=pytest.mark.needs(c[0])) for n, c in CHOSEN.items()])
def test_every_format(tiny_llama, tmp_path, case):
    """With biases that have been trained, and a float head that is folded before."""
    _, make, save, _ = CHOSEN[case]
    save(make(tiny_llama(**SIZES), tmp_path / "made"), tmp_path / "base")
    adapter = adapter_for(load(tmp_path / "base", **CPU), tmp_path / "adapter", RULES, train_bias="all")
    report, wanted = both(tmp_path / "base", adapter, tmp_path)
    assert {s.action for s in report if s.format != "dense"} == {"calibrated"}
    assert {s.tokens for s in report if s.format != "dense"} == {9 * 2 * 24}
    assert_same(tmp_path / "out", tmp_path / "memory")
    assert_same_lines(report, wanted)
    assert_loads_as(tmp_path / "out", tmp_path / "memory")


@pytest.mark.needs("gptqmodel", "optimum")
@pytest.mark.parametrize(
    "options",
    [("gptq", {"version": 2}), ("gptq", {"version": 1}), ("gptq", {"version": 1, "desc_act": True}), ("awq", {})],
    ids=["gptq v2", "gptq v1", "gptq v1 act-order", "awq"],
)
def test_gptq_and_awq(checkpoint, tmp_path, options):  # noqa: F811
    """Loaders that write into what they load: zeros of version 1 get one more each time."""
    method, made = options
    base, _ = checkpoint(method, **made)
    adapter = adapter_for(load(base), tmp_path / "adapter", {"all-linear": OFT(16)})
    report, wanted = both(base, adapter, tmp_path, loading={})
    assert_same_lines(report, wanted)
    assert_same(tmp_path / "out", tmp_path / "memory")
    assert_loads_as(tmp_path / "out", tmp_path / "memory")


@pytest.fixture
def nf4(tiny_llama, tmp_path):
    """A base in shards, an adapter, and a directory for the result."""
    CASES["nf4"][1](tiny_llama(**SIZES), tmp_path / "made").save_pretrained(tmp_path / "base", max_shard_size="30KB")
    return tmp_path / "base", adapter_for(load(tmp_path / "base"), tmp_path / "adapter", RULES), tmp_path / "out"


@pytest.mark.needs("bitsandbytes")
def test_hidden_states_on_the_disk(nf4, tmp_path, monkeypatch):
    """Every tensor that a forward waits with, however small, and nothing of it is left."""
    monkeypatch.setattr(spill, "_SMALL", 1)
    made = []
    real = spill.Spill.storage
    monkeypatch.setattr(spill.Spill, "storage", lambda own, size: made.append(size) or real(own, size))
    report, wanted = both(*nf4[:2], tmp_path, place="disk")
    assert_same(tmp_path / "out", tmp_path / "memory")
    assert_same_lines(report, wanted)
    assert len(made) > 14 * 2 * 9  # something at each of 14 layers, in both models, for each input
    assert not [p.name for p in (tmp_path / "out").rglob("*") if p.name.startswith((".", "hidden-"))]


@pytest.mark.needs("bitsandbytes", "peft")
def test_an_adapter_of_peft(tiny_llama, tmp_path):
    """Whose sites that read the same tensor are found by a recording, and rotate in one product."""
    import peft

    CASES["nf4"][1](tiny_llama(**SIZES), tmp_path / "made").save_pretrained(tmp_path / "base")
    config = peft.OFTConfig(target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"], oft_block_size=8)
    theirs = peft.get_peft_model(tiny_llama(**SIZES), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "oft" in name:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    both(tmp_path / "base", tmp_path / "adapter", tmp_path)
    assert_same(tmp_path / "out", tmp_path / "memory")


@pytest.mark.needs("bitsandbytes")
def test_a_policy_for_each_site(nf4, tmp_path):
    """Rotations that stay and layers that were rounded before take part in what the others read."""

    def each(site):
        return {"q_proj": "keep", "k_proj": "requantize"}.get(site.fqn.rpartition(".")[2], "calibrate")

    report, wanted = both(*nf4[:2], tmp_path, quantized=each)
    assert {s.action for s in report} == {"kept", "requantized", "calibrated", "folded"}
    assert_same_lines(report, wanted)
    assert_same(tmp_path / "out", tmp_path / "memory")
    assert_loads_as(tmp_path / "out", tmp_path / "memory")


@pytest.mark.needs("bitsandbytes")
def test_what_no_input_reaches_is_said(nf4, tmp_path):
    """Zeros at the embedding are zeros at the first layers; without a bias all layers read zeros."""
    base, adapter, out = nf4
    state = {}
    for file in sorted(base.glob("model*.safetensors")):
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            state = {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118
            kept = opened.metadata()
        if "model.embed_tokens.weight" in state:
            state["model.embed_tokens.weight"].zero_()
            save_file(state, file, kept)
    with pytest.warns(OftfxWarning, match="no calibration input reached this layer"):
        report = oftfx.fold_checkpoint(base, adapter, out, quantized="calibrate", calibration=data())
    q = next(s for s in report if s.fqn.endswith("0.self_attn.q_proj"))
    assert q.action == "requantized"
    assert "no calibration input reached this layer" in q.note


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize("stops", [1, 8, 13])
def test_killed_and_gone_on_with(nf4, tmp_path, monkeypatch, stops):
    """What has been calibrated is not done again, and what comes after it reads what it wrote."""
    base, adapter, out = nf4
    oftfx.fold_checkpoint(base, adapter, tmp_path / "whole", quantized="calibrate", calibration=data())
    done = []

    class Killed(BaseException):
        pass

    real = job.Job._write

    def write(own, writer, index, unit, folded):
        if unit.sites[0].action == "calibrate":
            if len(done) == stops:
                raise Killed
            done.append(unit.path)
        return real(own, writer, index, unit, folded)

    monkeypatch.setattr(job.Job, "_write", write)
    with pytest.raises(Killed):
        oftfx.fold_checkpoint(base, adapter, out, quantized="calibrate", calibration=data())
    assert not (out / "config.json").exists()
    first, done[:] = list(done), []
    stops = 99
    again = oftfx.fold_checkpoint(base, adapter, out, quantized="calibrate", calibration=data())
    assert len(first) + len(done) == 14
    assert not {*first} & {*done}
    assert sums(out) == sums(tmp_path / "whole")
    assert json.loads(again.to_json())["sites"] == note(tmp_path / "whole")["report"]["sites"]


@pytest.mark.needs("bitsandbytes")
def test_other_inputs_start_anew(nf4, monkeypatch):
    base, adapter, out = nf4

    def stop(own, batches, spilled=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job.Calibrating, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            oftfx.fold_checkpoint(base, adapter, out, quantized="calibrate", calibration=data())
    with pytest.warns(OftfxWarning, match="an earlier run with other input ended early"):
        oftfx.fold_checkpoint(base, adapter, out, quantized="calibrate", calibration=data(5))


@pytest.mark.needs("bitsandbytes")
def test_a_full_disk_under_the_hidden_states(nf4, monkeypatch):
    base, adapter, out = nf4

    def full(handle, begin, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill, "_SMALL", 1)
    with monkeypatch.context() as patch:
        patch.setattr(spill.os, "posix_fallocate", full)
        with pytest.raises(FoldError, match="the disk is full, there is no room for hidden states"):
            oftfx.fold_checkpoint(base, adapter, out, quantized="calibrate", calibration=data(), hidden_states="disk")
    oftfx.fold_checkpoint(base, adapter, out, quantized="calibrate", calibration=data(), hidden_states="disk")
    assert (out / "config.json").exists()


@pytest.mark.needs("bitsandbytes")
def test_progress_and_what_is_wrong(nf4, tmp_path):
    base, adapter, out = nf4
    seen = []
    options = {"quantized": "calibrate", "calibration": data(2)}
    with pytest.raises(FoldError, match="'calibrate' needs calibration="):
        oftfx.fold_checkpoint(base, adapter, out, quantized="calibrate")
    with pytest.raises(FoldError, match="cannot both calibrate layers and make floats of others"):
        each = lambda site: "float" if site.fqn.endswith("q_proj") else "calibrate"  # noqa: E731
        oftfx.fold_checkpoint(base, adapter, out, quantized=each, calibration=data())
    with pytest.raises(FoldError, match="hidden_states: got 'tape'"):
        oftfx.fold_checkpoint(base, adapter, out, hidden_states="tape", **options)
    with pytest.raises(FoldError, match="this system cannot reserve room"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill.Spill, "possible", False)
        oftfx.fold_checkpoint(base, adapter, out, hidden_states="disk", **options)
    with pytest.raises(FoldError, match="expected an iterable of inputs"):
        oftfx.fold_checkpoint(base, adapter, out, quantized="calibrate", calibration=data()[0])
    assert not out.exists()
    oftfx.fold_checkpoint(base, adapter, out, progress=lambda *a: seen.append(a), **options)
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.needs("bitsandbytes")
def test_inputs_that_nothing_asks_for_are_not_passed_over_in_silence(nf4):
    base, adapter, out = nf4
    with pytest.warns(OftfxWarning, match="no layer is calibrated, so these inputs are not used"):
        oftfx.fold_checkpoint(base, adapter, out, calibration=data(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64, torch.uint8], ids=str)
def test_buffers_that_no_checkpoint_has(dtype):
    """Written by the model's own rule, or refused; whatever was in memory before does not count."""

    class Model(nn.Module):
        def __init__(self, writes):
            super().__init__()
            self.writes = writes
            self.register_buffer("mask", torch.ones(3, device="meta").to(dtype), persistent=False)

        def _init_weights(self, module):
            if self.writes:
                module.mask.copy_(torch.tensor([0, 1, 0]))

    model = Model(True)
    make_buffers(model)
    assert torch.equal(model.mask, torch.tensor([0, 1, 0]).to(dtype))
    with pytest.raises(FoldError, match="does not say what is in its 'mask'"):
        make_buffers(Model(False))


def test_inputs_are_told_apart_by_all_their_numbers():
    """Python shows of a long tensor in a list only its ends."""
    one = {"pixels": [torch.zeros(5000)], "size": 3}
    other = {"pixels": [torch.zeros(5000)], "size": 3}
    assert digest_of(one) == digest_of(other)
    other["pixels"][0][2500] = 1
    assert digest_of(one) != digest_of(other)
    assert digest_of((torch.zeros(2, 3),)) != digest_of((torch.zeros(3, 2),))


@pytest.mark.needs("bitsandbytes")
def test_a_model_that_reads_a_weight_without_calling_its_layer(nf4, monkeypatch):
    from transformers.models.llama import modeling_llama

    base, adapter, out = nf4
    monkeypatch.setattr(
        modeling_llama.LlamaDecoderLayer, "forward", lambda self, x, **k: x * self.input_layernorm.weight
    )
    with pytest.raises(FoldError, match=r"cannot run layer by layer .*load the model and use oftfx.fold"):
        oftfx.fold_checkpoint(base, adapter, out, quantized="calibrate", calibration=data())
