"""GPTQ and AWQ checkpoints as transformers loads them: rotated, trained, folded, saved and loaded again."""

import json

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

import oftfx
from oftfx import OFT
from oftfx.errors import FoldError
from oftfx.formats.registry import format_of
from tests.ecosystem.twin import skews
from tests.reference import dense_rotation, randomize, rel
from tests.serving.vllm_server import spread

pytestmark = [
    pytest.mark.needs("transformers", "gptqmodel", "optimum"),
    pytest.mark.filterwarnings("ignore:.*kernels.*"),
]
GROUP = 32


def nibbles(codes, order=range(8)):
    """Eight 4-bit codes of a row in each int32, written down bit by bit; int64 (rows, n)."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for place, column in enumerate(order):
        words |= codes[:, column::8] << (4 * place)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def rounded(weight, g_idx, sym):
    """Codes (out, in), zeros and scales (out, groups), and the values they stand for."""
    groups = int(g_idx.max()) + 1
    scales, zeros = torch.empty(len(weight), groups), torch.empty(len(weight), groups)
    for g in range(groups):
        part = weight[:, g_idx == g]
        low, high = part.amin(1), part.amax(1)
        if sym:
            high = torch.maximum(-low, high)
            low = -high
        scales[:, g] = ((high - low) / 15).half()
        zeros[:, g] = 8 if sym else (-low / scales[:, g]).round().clamp(1, 15)
    codes = (weight / scales[:, g_idx] + zeros[:, g_idx]).round().clamp(0, 15)
    values = ((codes - zeros[:, g_idx]).half() * scales[:, g_idx].half()).float()
    return codes.long(), zeros.long(), scales, values


@pytest.fixture
def checkpoint(tiny_llama, tmp_path):
    """Writes a quantized checkpoint by hand; returns its path and the float model with the same values."""

    def make(method, *, version=2, sym=False, desc_act=False, backend=None, std=None, **changes):
        twin, tensors = tiny_llama(**changes), {}
        if std is not None:
            spread(twin, std)
        generator = torch.Generator().manual_seed(5)
        for name, layer in twin.named_modules():
            if not isinstance(layer, nn.Linear) or name == "lm_head":
                continue
            g_idx = torch.arange(layer.in_features) // GROUP
            if desc_act:
                g_idx = g_idx[torch.randperm(layer.in_features, generator=generator)]
            codes, zeros, scales, values = rounded(layer.weight.detach(), g_idx, sym)
            layer.weight.data = values
            if layer.bias is not None:
                layer.bias.data = layer.bias.data.half().float()
            if method == "gptq":
                tensors[f"{name}.qweight"] = nibbles(codes).T.contiguous()
                tensors[f"{name}.qzeros"] = nibbles(zeros.T - int(version == 1))
                tensors[f"{name}.g_idx"] = g_idx.int()
            else:
                order = [0, 2, 4, 6, 1, 3, 5, 7]
                tensors[f"{name}.qweight"] = nibbles(codes.T, order)
                tensors[f"{name}.qzeros"] = nibbles(zeros.T, order)
            tensors[f"{name}.scales"] = scales.T.half().contiguous()
            if layer.bias is not None:
                tensors[f"{name}.bias"] = layer.bias.data.half()
        kept = {n: t for n, t in twin.state_dict().items() if n not in tensors and f"{n[:-7]}.scales" not in tensors}
        path = tmp_path / "checkpoint"
        path.mkdir()
        save_file({**kept, **tensors}, path / "model.safetensors", metadata={"format": "pt"})
        quantization = {"quant_method": method, "bits": 4, "group_size": GROUP, "sym": sym, "desc_act": desc_act}
        if method == "gptq":
            quantization["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
        else:
            quantization |= {"zero_point": True, "version": "gemm"}
        if backend is not None:
            quantization["backend"] = backend
        config = {**twin.config.to_dict(), "quantization_config": quantization, "architectures": ["LlamaForCausalLM"]}
        (path / "config.json").write_text(json.dumps(config, default=str))
        return path, twin

    return make


def load(path, dtype=torch.float32):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(path, dtype=dtype).eval()
    for module in model.modules():
        vars(module).pop("dequantize_weight", None)  # compiled on the first call, for ten seconds
    return model


def rotate(twin, model):
    """The float model with the rotations of ``model`` in its weights."""
    for entry in oftfx.adapters(model)["default"]:
        weight = twin.get_submodule(entry.fqn).weight
        skew = model.get_parameter(f"{entry.owner}.oft.default.skew").detach()
        weight.data = (weight.data.double() @ dense_rotation(skew, entry.block_size, entry.blocks).T).float()
    return twin


def assert_same_weights(model, expected):
    quantized = {n: format_of(m) for n, m in expected.named_modules() if format_of(m) and not format_of(m).lossless}
    assert len(quantized) == 14
    for name, weight_format in quantized.items():
        got, wanted = (weight_format.dequantize(m.get_submodule(name)) for m in (model, expected))
        assert torch.equal(got, wanted), name


KINDS = {
    "gptq v1": ({"method": "gptq", "version": 1, "desc_act": True, "backend": "torch"}, "TorchLinear"),
    "gptq v1 sym": ({"method": "gptq", "version": 1, "sym": True, "backend": "torch"}, "TorchLinear"),
    "gptq v2": ({"method": "gptq", "version": 2, "backend": "torch"}, "TorchLinear"),
    "gptq aten": ({"method": "gptq", "version": 1, "backend": "auto_trainable"}, "TorchAtenLinear"),
    "gptq default": ({"method": "gptq", "version": 1, "desc_act": True}, None),
    "awq": ({"method": "awq", "backend": "torch_awq"}, "AwqTorchLinear"),
    "awq aten": ({"method": "awq", "backend": "auto_trainable"}, "TorchAtenAwqLinear"),
    "awq default": ({"method": "awq"}, None),
}
HALF = 2e-3
"""What AwqTorchLinear's own multiplication in float16 costs these logits."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_is_trained_folded_saved_and_loaded(checkpoint, ids, tmp_path, kind):
    options, expected_class = KINDS[kind]
    path, twin = checkpoint(**options)
    base = load(path)
    layer = base.model.layers[0].self_attn.q_proj
    assert expected_class in (None, type(layer).__name__)
    bound = HALF if type(layer).__name__ == "AwqTorchLinear" else 1e-5
    with torch.no_grad():
        assert rel(base(**ids()).logits, twin(**ids()).logits) < bound

    model = randomize(oftfx.transform(base, {"all-linear": OFT(16)}), std=0.05)
    assert {e.site.format for e in oftfx.adapters(model)["default"]} == {options["method"]}
    model.train()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(oftfx.adapter_parameters(model), lr=1e-3)
    model(**ids(), labels=ids()["input_ids"]).loss.backward()
    optimizer.step()
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == set(skews(model))
    rotate(twin, model)
    with torch.no_grad():
        assert rel(model.eval()(**ids()).logits, twin(**ids()).logits) < bound

    folded = oftfx.fold(model, quantized="requantize").model
    folded.save_pretrained(tmp_path / "folded")
    again = load(tmp_path / "folded")
    with torch.no_grad():
        wanted = folded(**ids()).logits
        assert rel(again(**ids()).logits, wanted) < bound
        assert 0.01 < rel(wanted, twin(**ids()).logits) < 0.3
    assert_same_weights(again, folded)
    # A second time, from what was loaded.
    again.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert rel(load(tmp_path / "again")(**ids()).logits, wanted) < bound


def test_without_the_note_a_saved_model_is_loaded_wrong(checkpoint, ids, tmp_path):
    """What transformers does by itself, so that this is noticed when it changes."""
    path, twin = checkpoint("gptq", version=1, backend="torch")
    base = load(path)
    base.save_pretrained(tmp_path / "plain")
    model = oftfx.transform(base, {"*q_proj": OFT(16)})
    assert base.config.quantization_config.format == "gptq"  # the original is left as it was
    model.save_pretrained(tmp_path / "noted")
    written = json.loads((tmp_path / "noted" / "config.json").read_text())["quantization_config"]
    assert written["format"] == written["checkpoint_format"] == "gptq_v2"
    zeros = "model.layers.0.self_attn.q_proj.qzeros"
    saved = [load_file(tmp_path / n / "model.safetensors")[zeros] for n in ("plain", "noted")]
    assert torch.equal(*saved)
    with torch.no_grad():
        expected = twin(**ids()).logits
        assert rel(load(tmp_path / "plain")(**ids()).logits, expected) > 0.5
        oftfx.fold(model).save(tmp_path / "folded")  # the rotations are the identity, so nothing is in front
        assert not (tmp_path / "folded" / "oftfx_rotations.safetensors").exists()
        assert rel(load(tmp_path / "folded")(**ids()).logits, expected) < 1e-5


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        *((kind, policy) for kind in ("gptq v1", "awq") for policy in ("keep", "float", "requantize", "mixed")),
        *((kind, "keep") for kind in ("gptq v2", "gptq aten", "awq aten")),
    ],
)
def test_a_folded_directory_brings_every_policy_back(checkpoint, ids, tmp_path, kind, policy):
    path, twin = checkpoint(**KINDS[kind][0])
    base = load(path)
    layer = base.model.layers[0].self_attn.q_proj
    bound = HALF if type(layer).__name__ == "AwqTorchLinear" else 1e-5
    model = randomize(oftfx.transform(base, {"all-linear": OFT(16)}), std=0.05)
    rotate(twin, model)
    mixed = lambda site: "float" if "mlp" in site.fqn else "keep"  # noqa: E731
    result = oftfx.fold(model, quantized=mixed if policy == "mixed" else policy)
    if policy == "mixed" and "gptq" in kind:  # whose configuration has no list of exceptions
        with pytest.raises(FoldError, match="became a float layer among quantized ones, which a GPTQConfig cannot say"):
            result.save(tmp_path / "folded")
        assert not (tmp_path / "folded").exists()
        return
    result.save(tmp_path / "folded")
    again = oftfx.load_folded(tmp_path / "folded", dtype=torch.float32)
    for module in again.modules():
        vars(module).pop("dequantize_weight", None)
    with torch.no_grad():
        wanted = result.model(**ids()).logits
        assert rel(again(**ids()).logits, wanted) < bound
        if policy != "requantize":
            assert rel(again(**ids()).logits, twin(**ids()).logits) < bound


@pytest.mark.parametrize("kind", ["gptq v1", "gptq v1 sym", "gptq v2", "gptq aten", "awq", "awq aten"])
def test_a_calibrated_model_is_nearer_and_is_saved_and_loaded(checkpoint, ids, tmp_path, kind):
    """Act-order, both versions of zeros, symmetric and not; on tokens that were not calibrated on."""
    options, _ = KINDS[kind]
    path, twin = checkpoint(**options)
    model = randomize(oftfx.transform(load(path), {"all-linear": OFT(16)}), std=0.05)
    rotate(twin, model)
    batches = [ids(8, 40, seed=s) for s in range(4)]
    fresh, errors = ids(8, 40, seed=9), {}
    with torch.no_grad():
        wanted = twin(**fresh).logits
        for policy in ("requantize", "calibrate"):
            result = oftfx.fold(model, quantized=policy, calibration=batches)
            errors[policy] = rel(result.model(**fresh).logits, wanted)
    assert {s.action for s in result.report if s.format != "dense"} == {"calibrated"}
    assert errors["calibrate"] < 0.9 * errors["requantize"]
    result.model.save_pretrained(tmp_path / "folded")
    again = load(tmp_path / "folded")
    assert_same_weights(again, result.model)
    with torch.no_grad():
        bound = HALF if kind == "awq" else 1e-5
        assert rel(again(**fresh).logits, result.model(**fresh).logits) < bound
        assert rel(oftfx.unfold(result)(**fresh).logits, wanted) < bound


@pytest.mark.parametrize("policy", ["keep", "float"])
def test_other_policies(checkpoint, ids, policy):
    path, twin = checkpoint("gptq", version=1, desc_act=True, backend="torch")
    model = randomize(oftfx.transform(load(path), {"all-linear": OFT(16)}), std=0.05)
    rotate(twin, model)
    with torch.no_grad():
        assert rel(oftfx.fold(model, quantized=policy).model(**ids()).logits, twin(**ids()).logits) < 1e-5


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.filterwarnings("ignore:.*had repacked this weight.*")
def test_a_model_that_its_kernels_have_repacked_is_saved_so_that_it_loads(checkpoint, ids, tmp_path, method):
    """Of the default kernels for bfloat16 on a CPU; without oftfx the file has sizes that nothing loads."""
    path, twin = checkpoint(method, version=1, attention_bias=method == "gptq")  # AWQ's kernel mistakes dtypes with one
    base = load(path, torch.bfloat16)
    with torch.no_grad():
        base(**ids())
    assert base.model.layers[0].self_attn.q_proj._cpu_transformed
    model = randomize(oftfx.transform(base, {"all-linear": OFT(16)}), std=0.05).train()
    model(**ids()).logits.float().sum().backward()
    assert all(p.grad.any() for p in oftfx.adapter_parameters(model))
    rotate(twin, model)
    with torch.no_grad():
        assert rel(model.eval()(**ids()).logits, twin(**ids()).logits) < 3e-2
    folded = oftfx.fold(model, quantized="requantize").model
    folded.save_pretrained(tmp_path / "folded")
    assert_same_weights(load(tmp_path / "folded", torch.bfloat16), folded)
