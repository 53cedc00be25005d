"""Folds that keep rotations, saved for a server: what transformers makes of the code, and what the transforms hold."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import oftfx
from oftfx import OFT
from oftfx.adapter.integer_layers import integers_of
from oftfx.errors import AdapterFileError, FoldError
from tests.adapter.kept_models import SHARED, compressed_base, kept
from tests.ecosystem import published
from tests.ecosystem.test_quantized_checkpoints import quantized_layers

pytestmark = pytest.mark.needs("transformers", "compressed_tensors")
SIZES = {"hidden_size": 128, "intermediate_size": 192, "attention_bias": False, "mlp_bias": False}
FOR_VLLM = {"save_as": "compressed-tensors", "server": "vllm"}


@pytest.fixture
def base(tiny_llama, tmp_path):
    return compressed_base(tiny_llama(**SIZES), tmp_path)


@pytest.fixture
def logits(ids, tmp_path, monkeypatch):
    """Of a directory, by transformers and the code in it."""
    from transformers import AutoModelForCausalLM, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    tokens = ids(2, 17)["input_ids"]

    @torch.no_grad()
    def of(model):
        if isinstance(model, torch.nn.Module):
            return model(tokens).logits
        options = {"trust_remote_code": True, "dtype": torch.float16}
        read = AutoModelForCausalLM.from_pretrained(model, **options).eval()
        assert type(read).__name__ == "RotatedLlamaForCausalLM"
        return read(tokens).logits

    return of


def test_the_code_beside_the_weights(base, logits, tmp_path):
    """transformers reads it by the code, which imports nothing of ours: the logits of the fold, to the bit."""
    rules = {"*.self_attn.*": OFT(16), "*.down_proj": OFT(24), "*.up_proj": OFT(32, block_share=True)}
    result = kept(base, rules)
    result.save(tmp_path / "made", **FOR_VLLM)
    got, wanted, plain = (logits(m) for m in (tmp_path / "made", result.model, base))
    assert torch.equal(got, wanted)
    assert (plain - wanted).norm() > 0.1 * wanted.norm()
    code = (tmp_path / "made" / "modeling_rotated.py").read_text()
    imported = {n.split()[1].partition(".")[0] for n in code.splitlines() if n.startswith(("import ", "from "))}
    assert imported == {"__future__", "collections", "typing", "torch", "transformers"}
    with pytest.raises(AdapterFileError, match="trust_remote_code=True"):
        oftfx.load_folded(tmp_path / "made")


def test_what_the_transforms_hold(base, tmp_path):
    """By the published meaning, ``x @ stored / sqrt(n)``: the rotations, and codes that are the base's."""
    result = kept(base, SHARED)
    result.save(tmp_path / "made", **FOR_VLLM, rotations="transforms")
    stored = load_file(tmp_path / "made" / "model.safetensors")
    config = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    schemes = config["transform_config"]["config_groups"]
    blocks = {f: p.fixed[0].blocks for f, p in oftfx.placement.find.rotated_sites(result.model)}
    seen = []
    for name, scheme in schemes.items():
        (apply,) = scheme["apply"]
        for path in apply["targets"]:
            matrix = stored[f"{path}.{name}_input.weight"]
            matrix = matrix / len(matrix) ** 0.5
            own = blocks[path]
            if scheme["head_dim"] is not None:
                matrix = torch.block_diag(*[matrix] * (own.shape[0] * own.shape[1] // scheme["head_dim"]))
            assert torch.allclose(matrix, torch.block_diag(*own).float(), atol=1e-6), path
            seen.append(path)
    assert sorted(seen) == sorted(quantized_layers(result.model))
    assert len(schemes) == 8  # q, k and v have one; so have gate and up; o and down have their own: twice
    assert not (tmp_path / "made" / "oftfx_rotations.safetensors").exists()
    for path in seen:
        part = {k[len(path) + 1 :]: v for k, v in stored.items() if k.startswith(f"{path}.weight")}
        wanted = integers_of(path, base.get_submodule(path), "").weight
        assert torch.equal(published.pack_quantized(part, config).half().float(), wanted), path


def test_refusals_by_site(base, tiny_llama, logits, tmp_path):
    """Of transforms: what vLLM joins, biases, large matrices; of both: what is no input of a linear layer."""

    def refused(model, rules, match, **options):
        with pytest.raises(FoldError, match=match):
            kept(model, rules).save(tmp_path / "out", **FOR_VLLM, **options)
        assert not (tmp_path / "out").exists()

    transforms = {"rotations": "transforms"}
    refused(base, {"*.q_proj": OFT(16)}, r"layers.0.self_attn.q_proj: .* together with .*k_proj", **transforms)
    refused(base, {"all-linear": OFT(16)}, "and 6 more sites. Fold these .* rotations='code'", **transforms)
    (tmp_path / "biased").mkdir()
    biased = compressed_base(tiny_llama(**SIZES | {"attention_bias": True}), tmp_path / "biased")
    refused(biased, {"*.o_proj": OFT(16)}, "o_proj: it has a bias", **transforms)
    result = kept(biased, {"*.o_proj": OFT(16)})
    result.save(tmp_path / "code", **FOR_VLLM)
    assert torch.equal(logits(tmp_path / "code"), logits(result.model))
    (tmp_path / "wide").mkdir()
    wide = compressed_base(tiny_llama(**SIZES | {"hidden_size": 64, "intermediate_size": 2080}), tmp_path / "wide")
    refused(wide, {"*.down_proj": OFT(16)}, "a matrix of 2080 x 2080", **transforms)
    kept(wide, {"*.down_proj": OFT(16, block_share=True)}).save(tmp_path / "one", **FOR_VLLM, **transforms)
    with pytest.raises(FoldError, match="known: code, transforms"):
        kept(base, SHARED).save(tmp_path / "out", **FOR_VLLM, rotations="other")
    with pytest.raises(FoldError, match="is for a fold with quantized='keep'"):
        kept(base, SHARED).save(tmp_path / "out", rotations="code")
    with pytest.raises(FoldError, match="save_as='compressed-tensors' writes weights"):
        kept(base, SHARED).save(tmp_path / "out", server="vllm")
