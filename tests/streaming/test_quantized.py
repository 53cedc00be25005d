"""Folds of quantized checkpoint directories: what a fold in memory writes, to the bit, by every policy."""

import pytest
import torch

import oftfx
from oftfx import OFT
from oftfx.errors import FoldError
from oftfx.formats.registry import format_of
from tests.ecosystem.test_gptq_awq import checkpoint  # noqa: F401  (a fixture)
from tests.ecosystem.test_quantized_checkpoints import CASES, SIZES, quantized_layers
from tests.streaming.compare import adapter_for, assert_same, files, in_memory, note, tensors

pytestmark = [
    pytest.mark.needs("transformers", "accelerate"),
    pytest.mark.filterwarnings("ignore:.*kernels.*"),
    pytest.mark.filterwarnings("ignore::oftfx.errors.OftfxWarning"),
]
RULES = {"all-linear": OFT(16), "lm_head": OFT(16)}
ACTIONS = {"keep": "kept", "requantize": "requantized", "float": "dequantized", "reference": "from reference"}
CHOSEN = {n: c for n, c in CASES.items() if c[0] != "hqq"}
"""hqq's own files are pickles, which nothing here reads."""


CPU = {"device_map": {"": "cpu"}}


def load(path, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


@pytest.mark.parametrize("policy", ACTIONS)
@pytest.mark.parametrize("case", [pytest.param(n, marks=pytest.mark.needs(c[0])) for n, c in CHOSEN.items()])
def test_every_format_and_policy(tiny_llama, tmp_path, case, policy):
    _, make, save, _ = CHOSEN[case]
    tiny_llama(**SIZES).save_pretrained(tmp_path / "float")
    save(make(tiny_llama(**SIZES), tmp_path / "made"), tmp_path / "base")
    adapter = adapter_for(load(tmp_path / "base", **CPU), tmp_path / "adapter", RULES, train_bias="all")
    options = {"reference": tmp_path / "float"} if policy == "reference" else {}
    result = in_memory(load(tmp_path / "base", **CPU), adapter, tmp_path / "memory", quantized=policy, **options)
    before = files(tmp_path / "base")
    report = oftfx.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "out", quantized=policy, **options)
    assert files(tmp_path / "base") == before
    assert_same(tmp_path / "out", tmp_path / "memory")
    assert {s.action for s in report if s.format != "dense"} == {ACTIONS[policy]}
    assert_same_lines(report, result.report)
    kept = [(p / "oftfx_rotations.safetensors") for p in (tmp_path / "out", tmp_path / "memory")]
    if policy == "keep":
        assert kept[0].read_bytes() == kept[1].read_bytes()
    assert_loads_as(tmp_path / "out", tmp_path / "memory")


def assert_same_lines(got, wanted):
    assert [(s.fqn, s.action, s.bytes_before, s.bytes_after) for s in got] == [
        (s.fqn, s.action, s.bytes_before, s.bytes_after) for s in wanted
    ]
    assert [s for s in got if s.action != "kept"] == [s for s in wanted if s.action != "kept"]


def assert_loads_as(got, wanted):
    """The same layers with the same weights, and the same rotations."""
    one, other = (oftfx.load_folded(p) for p in (got, wanted))
    assert [type(m) for m in one.modules()] == [type(m) for m in other.modules()]
    assert note(got)["report"]["sites"][0].keys() == note(wanted)["report"]["sites"][0].keys()
    layers = quantized_layers(other)
    for path in layers:
        a, b = (format_of(m.get_submodule(path)).dequantize(m.get_submodule(path)) for m in (one, other))
        assert torch.equal(a, b), path


@pytest.mark.needs("gptqmodel", "optimum")
@pytest.mark.parametrize("policy", ["keep", "requantize", "float"])
@pytest.mark.parametrize(
    "options",
    [("gptq", {"version": 2}), ("gptq", {"version": 1}), ("gptq", {"version": 1, "desc_act": True}), ("awq", {})],
    ids=["gptq v2", "gptq v1", "gptq v1 act-order", "awq"],
)
def test_gptq_and_awq(checkpoint, tmp_path, options, policy):  # noqa: F811
    method, made = options
    base, _ = checkpoint(method, **made)
    adapter = adapter_for(load(base), tmp_path / "adapter", {"all-linear": OFT(16)})
    before = tensors(base)
    result = in_memory(load(base), adapter, tmp_path / "memory", quantized=policy)
    report = oftfx.fold_checkpoint(base, adapter, tmp_path / "out", quantized=policy)
    assert_same_lines(report, result.report)
    assert_same(tmp_path / "out", tmp_path / "memory")
    if policy == "keep":
        assert all(torch.equal(t, before[n]) for n, t in tensors(tmp_path / "out").items())
    assert_loads_as(tmp_path / "out", tmp_path / "memory")


@pytest.mark.needs("bitsandbytes")
def test_a_policy_for_each_site(tiny_llama, ids, tmp_path):
    """Floats among quantized layers are named in the configuration; shards; double quantization."""
    _, make, _, _ = CASES["nf4, double"]
    make(tiny_llama(**SIZES), tmp_path / "made").save_pretrained(tmp_path / "base", max_shard_size="30KB")
    adapter = adapter_for(load(tmp_path / "base"), tmp_path / "adapter", {"all-linear": OFT(16)})

    def each(site):
        return {"q_proj": "keep", "k_proj": "float", "v_proj": "requantize"}.get(site.fqn.rpartition(".")[2], "keep")

    result = in_memory(load(tmp_path / "base"), adapter, tmp_path / "memory", quantized=each)
    report = oftfx.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "out", quantized=each)
    assert_same(tmp_path / "out", tmp_path / "memory")
    assert_same_lines(report, result.report)
    assert len([*(tmp_path / "out").glob("model-*")]) > 2
    one, other = (oftfx.load_folded(tmp_path / p) for p in ("out", "memory"))
    assert torch.equal(one(**ids()).logits, other(**ids()).logits)


@pytest.mark.needs("compressed_tensors")
def test_floats_that_a_config_cannot_name(checkpoint, tmp_path):  # noqa: F811
    base, _ = checkpoint("gptq")
    adapter = adapter_for(load(base), tmp_path / "adapter", {"*.q_proj": OFT(16)})
    with pytest.raises(FoldError, match="became a float layer among quantized ones, which a GPTQConfig cannot say"):
        oftfx.fold_checkpoint(base, adapter, tmp_path / "out", quantized="float")
    assert not (tmp_path / "out").exists()
