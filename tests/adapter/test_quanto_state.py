"""Folded models of transformers with layers of optimum-quanto: in files that the package's own loader reads."""

import json

import pytest
import torch
from safetensors.torch import load_file

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterFileError
from tests.reference import randomize, rel

pytestmark = pytest.mark.needs("optimum.quanto", "transformers", "accelerate")


@pytest.fixture
def base(tiny_llama, tmp_path):
    """As transformers loads it: layers of the package in a model that transformers refuses to save."""
    from transformers import LlamaForCausalLM, QuantoConfig

    def make(kind="int4", **changes):
        tiny_llama(hidden_size=192, intermediate_size=160, **changes).save_pretrained(tmp_path / "float")
        config = QuantoConfig(weights=kind)
        return LlamaForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config).eval()

    return make


def fold(model, policy, ids):
    model = randomize(oftfx.transform(model, {"all-linear": OFT(16)}), std=0.1).eval()
    return oftfx.fold(model, quantized=policy, calibration=[ids(4, 20, seed=s) for s in range(2)])


@torch.no_grad()
def logits(model, ids):
    return model(**ids()).logits


@pytest.mark.parametrize("policy", ["requantize", "calibrate"])
@pytest.mark.parametrize("kind", ["int8", "float8", "int4", "int2"])
def test_the_packages_loader_and_ours_read_it(base, ids, tmp_path, kind, policy):
    from optimum.quanto import QuantizedModelForCausalLM

    result = fold(base(kind), policy, ids)
    wanted = logits(result.model, ids)
    result.save(tmp_path / "folded")
    loaded = oftfx.load_folded(tmp_path / "folded")
    assert torch.equal(logits(loaded, ids), wanted)
    theirs = QuantizedModelForCausalLM.from_pretrained(tmp_path / "folded")
    assert rel(logits(theirs, ids), wanted) < 1e-6
    assert loaded.generation_config.to_dict() == result.model.generation_config.to_dict()
    stored = load_file(tmp_path / "folded" / "model.safetensors")
    # Codes, not floats: no file has more bytes for a weight than the layer.
    assert "model.layers.0.mlp.up_proj.weight" not in stored
    again = fold(loaded, policy, ids)  # a model that came from a file is a base like any other
    assert torch.equal(logits(oftfx.load_folded(again.save(tmp_path / "again")), ids), logits(again.model, ids))


def test_rotations_that_stay(base, ids, tmp_path):
    result = fold(base(), "keep", ids)
    loaded = oftfx.load_folded(result.save(tmp_path / "folded"))
    assert torch.equal(logits(loaded, ids), logits(result.model, ids))


def test_float_layers_beside_quantized_ones(base, ids, tmp_path):
    model = randomize(oftfx.transform(base(), {"*.mlp.*": OFT(16)}), std=0.1).eval()
    result = oftfx.fold(model, quantized="float")
    loaded = oftfx.load_folded(result.save(tmp_path / "folded"))
    assert type(loaded.model.layers[1].mlp.up_proj) is torch.nn.Linear
    assert "model.layers.1.mlp.up_proj" not in json.loads((tmp_path / "folded" / "quanto_qmap.json").read_text())
    assert torch.equal(logits(loaded, ids), logits(result.model, ids))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_as_they_are(base, ids, tmp_path, tied):
    result = fold(base(tie_word_embeddings=tied), "requantize", ids)
    loaded = oftfx.load_folded(result.save(tmp_path / "folded"))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(logits(loaded, ids), logits(result.model, ids))


def test_what_does_not_fit(base, ids, tmp_path, tiny_llama):
    fold(base(), "requantize", ids).save(tmp_path / "folded")
    with pytest.raises(AdapterFileError, match="no device_map="):
        oftfx.load_folded(tmp_path / "folded", device_map="cpu")
    with pytest.raises(AdapterFileError, match="only in the file"):
        oftfx.load_folded(tmp_path / "folded", tiny_llama(hidden_size=192, intermediate_size=160))
    file = tmp_path / "folded" / "quanto_qmap.json"
    good = json.loads(file.read_text())
    site = next(iter(good))
    for bad, said in (
        ("{", "is not a JSON object"),
        ("[1]", "is not a JSON object, but list"),
        (json.dumps(good | {site: "int8"}), f"is damaged: .{site} is 'int8', expected an object"),
        (json.dumps(good | {site: {}}), f"is damaged: {site}.weights is None, expected one of none, "),
        (json.dumps(good | {site: {"weights": "qint9", "activations": "none"}}), "weights is 'qint9', expected one of"),
        (json.dumps(good | {"model.nowhere": good[site]}), "has no attribute `nowhere`; save the fold again"),
    ):
        file.write_text(bad)
        with pytest.raises(AdapterFileError, match=said):
            oftfx.load_folded(tmp_path / "folded")
    file.write_text(json.dumps(good))
    other = base("int8")
    with pytest.raises(AdapterFileError, match=r"layers\.0\.self_attn"):
        oftfx.load_folded(tmp_path / "folded", other)
