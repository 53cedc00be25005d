"""Rotations that stay in front of quantized weights, saved beside the checkpoint of their format."""

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import save_file

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterFileError, FoldError, OftfxWarning
from tests.reference import randomize


def contents(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata(), {n: opened.get_tensor(n) for n in sorted(opened.keys())}


@pytest.mark.needs("bitsandbytes", "transformers")
@pytest.mark.parametrize("share", [False, True])
def test_a_kept_fold_survives_its_checkpoint(tiny_llama, tmp_path, share):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(hidden_size=128, intermediate_size=192).save_pretrained(tmp_path / "float")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    model = randomize(oftfx.transform(base, {"all-linear": OFT(16, share_input=share)}), std=0.1).eval()
    folded = oftfx.fold(model, quantized="keep").model
    with pytest.warns(OftfxWarning, match="wrote oftfx_rotations.safetensors beside the checkpoint"):
        folded.save_pretrained(tmp_path / "folded")
    written = contents(tmp_path / "folded" / "oftfx_rotations.safetensors")
    oftfx.save_rotations(folded, tmp_path / "folded")
    assert contents(tmp_path / "folded" / "oftfx_rotations.safetensors")[0] == written[0]

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    loaded = oftfx.load_rotations(plain, tmp_path / "folded")
    assert loaded is plain
    ids = torch.randint(1, 131, (2, 9))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, folded(ids).logits)
    again = oftfx.save_rotations(loaded, tmp_path / "again")
    first, second = (contents(f) for f in (tmp_path / "folded" / "oftfx_rotations.safetensors", again))
    assert len(first[0].pop("checkpoint")) == 64  # nothing is beside the second one
    assert first[0] == second[0]
    assert list(first[1]) == list(second[1])
    assert all(torch.equal(v, second[1][n]) for n, v in first[1].items())
    with pytest.raises(AdapterFileError, match="has rotations already"):
        oftfx.load_rotations(loaded, tmp_path / "folded")


@pytest.mark.needs("bitsandbytes")
def test_faults(tmp_path):
    from oftfx.formats.bnb8 import make_linear8bit

    model = nn.Sequential(make_linear8bit(nn.Linear(64, 32)))
    with pytest.raises(FoldError, match="no fixed rotations"):
        oftfx.save_rotations(model, tmp_path)
    with pytest.raises(AdapterFileError, match="there is no oftfx_rotations.safetensors"):
        oftfx.load_rotations(model, tmp_path)
    folded = oftfx.fold(randomize(oftfx.transform(model, {"0": OFT(8)})), quantized="keep").model
    file = oftfx.save_rotations(folded, tmp_path)
    with pytest.raises(AdapterFileError, match="0 has in_features 32, the saved rotation 64"):
        oftfx.load_rotations(nn.Sequential(nn.Linear(32, 8)), tmp_path)
    with pytest.raises(AdapterFileError, match="rotates 0, which ModuleDict does not have"):
        oftfx.load_rotations(nn.ModuleDict({"a": nn.Linear(64, 8)}), tmp_path)
    file.write_bytes(b"nothing")
    with pytest.raises(AdapterFileError, match="damaged or not of oftfx"):
        oftfx.load_rotations(model, tmp_path)


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize(("version", "advice"), [(2, "A newer oftfx wrote it"), (0, "An older one wrote it")])
def test_another_version_is_named(tmp_path, version, advice):
    from oftfx.formats.bnb8 import make_linear8bit

    folded = oftfx.fold(randomize(oftfx.transform(nn.Sequential(make_linear8bit(nn.Linear(64, 32))), {"0": OFT(8)})))
    file = oftfx.save_rotations(folded.model, tmp_path)
    notes, tensors = contents(file)
    file.unlink()  # old safetensors gives views of the file, which may not be written over
    save_file(tensors, file, {**notes, "oftfx_rotations": str(version)})
    with pytest.raises(AdapterFileError, match=rf"has version {version}; this oftfx reads version 1\. {advice}"):
        oftfx.load_rotations(nn.Sequential(make_linear8bit(nn.Linear(64, 32))), tmp_path)
