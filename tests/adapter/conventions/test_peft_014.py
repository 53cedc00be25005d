"""Files that PEFT 0.14, 0.15 and 0.17 wrote, with the outputs that they computed
(tools/compare/foreign_fixtures.py)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError, AdapterFileError, OftfxWarning
from tests.adapter.conventions.models import CONVOLUTIONS, LINEARS, apart, matrix, net, outputs, with_weights
from tests.reference import randomize, rel

FILES = Path(__file__).parent / "files"
CASES = sorted(p.relative_to(FILES).as_posix() for p in FILES.glob("*/*"))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def test_the_files_are_there():
    assert len(CASES) == 12


@pytest.mark.filterwarnings("ignore::oftfx.errors.OftfxWarning")
@pytest.mark.parametrize("case", CASES)
def test_an_old_file_gives_the_outputs_of_the_version_that_wrote_it(case):
    expected = load_file(FILES / case / "outputs.safetensors")["outputs"]
    assert oftfx.adapter_convention(FILES / case) == ("peft-0.16" if "0.17" in case else "peft-0.14")
    ours = oftfx.load_adapter(net(), FILES / case)
    assert apart(ours) > 1e-3
    assert rel(outputs(ours), expected) <= 1e-6
    assert rel(outputs(oftfx.fold(ours).model), expected) <= 1e-6


def by_formula(directory):
    """PEFT 0.14 in float64: ``diag(s) W R^T`` with ``R = (I - S)(I + S)^-1``, ``S = (A - A^T) / 2``."""
    tensors = load_file(directory / WEIGHTS)
    weights = {}
    for name in (*LINEARS, *CONVOLUTIONS):
        a = tensors.get(f"base_model.model.{name}.oft_r")
        if a is None:
            continue
        s = (a.double() - a.double().transpose(1, 2)) / 2
        eye = torch.eye(s.shape[1], dtype=torch.float64)
        r = (eye - s) @ torch.linalg.inv(eye + s)
        w = matrix(name)
        r = r.expand(w.shape[1] // s.shape[1], -1, -1)
        weights[name] = tensors[f"base_model.model.{name}.oft_s"].double() * (w @ torch.block_diag(*r).T)
    return outputs(with_weights(weights))


@pytest.mark.parametrize(
    "spec",
    [
        OFT(4, parameterization="cayley"),
        OFT(blocks=2, parameterization="cayley"),
        OFT(4, parameterization="cayley", block_share=True),
        OFT(4, parameterization="cayley", coft_eps=0.1),
    ],
)
def test_written_by_the_formula(tmp_path, spec):
    model = randomize(oftfx.transform(net(), {"*": spec}), std=0.3).eval()
    oftfx.save_adapter(model, tmp_path, convention="peft-0.14")
    assert "peft_version" not in json.loads((tmp_path / CONFIG).read_text())
    assert rel(outputs(model), by_formula(tmp_path)) <= 1e-6
    assert rel(outputs(oftfx.load_adapter(net(), tmp_path)), outputs(model)) <= 1e-6


@pytest.mark.parametrize("case", ["peft-0.14.0/linear", "peft-0.15.2/conv"])
def test_scales_of_rows_go_both_ways(tmp_path, case):
    with pytest.warns(OftfxWarning, match="2 layers.*|4 layers.*keeps a copy of their weights"):
        ours = oftfx.load_adapter(net(), FILES / case)
    assert all(n.endswith(".weight") for n in oftfx.adapters(ours)["default"].brought)
    with oftfx.disable_adapters(ours):
        assert torch.equal(outputs(ours), outputs(net()))
    oftfx.save_adapter(ours, tmp_path, convention="peft-0.14")
    theirs, mine = load_file(FILES / case / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert set(theirs) == set(mine)
    for name in theirs:
        a, b = (t[name].double() for t in (theirs, mine))
        a, b = ((t - t.transpose(1, 2)) / 2 if name.endswith("oft_r") else t for t in (a, b))
        assert rel(b, a) <= 1e-6, name


def test_training_goes_on_with_the_scales(tmp_path):
    with pytest.warns(OftfxWarning):
        model = oftfx.load_adapter(net(), FILES / "peft-0.14.0/linear", trainable=True)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(n.endswith(".skew") for n in trained)
    outputs(model)


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (
            lambda t, c: t.update({"base_model.model.blocks.0.to_q.oft_s": torch.ones(7, 1)}),
            AdapterFileError,
            r"\(12, 1\)",
        ),
        (
            lambda t, c: t.update({"base_model.model.blocks.0.to_q.oft_r": torch.ones(3, 4, 4)}),
            AdapterFileError,
            "needs",
        ),
        (lambda t, c: t.update({"base_model.model.blocks.0.to_q.oft_r": torch.ones(2, 4)}), AdapterFileError, "needs"),
        (lambda t, c: t.pop("base_model.model.blocks.0.to_q.oft_r"), AdapterFileError, "to_q has no oft_r"),
        (lambda t, c: t.update({"base_model.model.there.oft_r": torch.ones(2, 4, 4)}), AdapterError, "rotates there"),
        (lambda t, c: c.update(peft_type="LORA"), AdapterFileError, "peft_type is 'LORA'"),
        (lambda t, c: c.update(target_modules=["to_q", "to_out.0", "proj"]), AdapterFileError, "no rotation for proj"),
        (lambda t, c: c.clear(), AdapterFileError, "peft_type is None"),
    ],
    ids=range(8),
)
def test_damage_is_refused(tmp_path, damage, kind, message):
    shutil.copytree(FILES / "peft-0.14.0/linear", tmp_path / "a")
    tensors, config = load((tmp_path / "a" / WEIGHTS).read_bytes()), json.loads((tmp_path / "a" / CONFIG).read_text())
    damage(tensors, config)
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(kind, match=message):
        oftfx.load_adapter(net(), tmp_path / "a")


def test_versions_are_told_by_the_file_and_never_taken_for_each_other(tmp_path):
    new = FILES / "peft-0.17.1/linear"
    with pytest.raises(AdapterFileError, match="not convention 'peft'.*peft_version"):
        oftfx.load_adapter(net(), new, convention="peft")
    with pytest.raises(AdapterFileError, match="oft_R.weight is nothing that|no rotation|oft_R"):
        oftfx.load_adapter(net(), new, convention="lycoris")
    shutil.copytree(new, tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config | {"peft_version": "0.18.0"}))
    assert oftfx.adapter_convention(tmp_path / "a") == "peft"
    assert rel(outputs(oftfx.load_adapter(net(), tmp_path / "a")), outputs(oftfx.load_adapter(net(), new))) > 1e-5


@pytest.mark.parametrize("kind", ["cayley", "cayley_neumann_016"])
def test_peft_016_is_written_without_a_version_where_it_means_the_same(tmp_path, kind):
    model = randomize(oftfx.transform(net(), {"*.to_q": OFT(4, parameterization=kind)}), std=0.2).eval()
    oftfx.save_adapter(model, tmp_path, convention="peft-0.16")
    assert oftfx.adapter_convention(tmp_path) == "peft-0.16"
    assert torch.equal(outputs(oftfx.load_adapter(net(), tmp_path)), outputs(model))
    with pytest.raises(AdapterError, match="5 terms of today's would be other rotations there"):
        oftfx.save_adapter(oftfx.transform(net(), {"*.to_q": OFT(4)}), tmp_path, convention="peft-0.16")
    assert oftfx.adapter_convention(tmp_path) == "peft-0.16"


def test_what_an_exact_rotation_cannot_say_is_refused_with_its_size(tmp_path):
    model = randomize(oftfx.transform(net(), {"proj": OFT(4)}), std=0.1)
    with pytest.raises(
        AdapterError, match=r"proj: convention 'peft-0.14' has exact rotations.*off from any by a relative"
    ):
        oftfx.save_adapter(model, tmp_path / "a", convention="peft-0.14")
    small = randomize(oftfx.transform(net(), {"proj": OFT(4)}), std=1e-4).eval()
    oftfx.save_adapter(small, tmp_path / "a", convention="peft-0.14")
    assert rel(outputs(oftfx.load_adapter(net(), tmp_path / "a")), outputs(small)) <= 1e-6
    with pytest.raises(AdapterError, match="one block_size"):
        mixed = oftfx.transform(
            net(), {"proj": OFT(4, parameterization="cayley"), "conv_in": OFT(6, parameterization="cayley")}
        )
        oftfx.save_adapter(mixed, tmp_path / "b", convention="peft-0.14")
    with pytest.raises(AdapterError, match="is a directory"):
        oftfx.save_adapter(small, tmp_path / "b.safetensors", convention="peft-0.14")


def test_scales_cannot_go_into_quantized_or_tied_weights(tmp_path):
    tied = net()
    tied.blocks[1].to_q.weight = tied.blocks[0].to_q.weight
    with pytest.raises(AdapterError, match="its weight is also blocks.1.to_q.weight"):
        oftfx.load_adapter(tied, FILES / "peft-0.14.0/linear")
