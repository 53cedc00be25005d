"""OneTrainer's OFT and sd-scripts' networks.oft_v2, by their formulas, both ways."""

import math

import pytest
import torch
from safetensors.torch import load_file

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError, AdapterFileError
from tests.adapter.conventions.models import CONVOLUTIONS, LINEARS, apart, matrix, net, outputs, spread, with_weights
from tests.adapter.conventions.published import oft_v2, write
from tests.reference import randomize, rel

LAYERS = (*LINEARS, *CONVOLUTIONS)


def numbers(name, *, size=4, shared=False, width=0.15):
    rows = 1 if shared else matrix(name).shape[1] // size
    return spread((rows, size * (size - 1) // 2), len(name), width).float()


def key(name, prefix="lora_unet_"):
    return prefix + name.replace(".", "_")


def expected(found, **options):
    weights = {n: oft_v2(matrix(n), rows, 4, convolution=n in CONVOLUTIONS, **options) for n, rows in found.items()}
    return outputs(with_weights(weights))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_read_by_the_formula(tmp_path, scaled, shared):
    rows = {n: numbers(n, shared=shared, width=0.5 if scaled else 0.15) for n in LAYERS}
    tensors = {f"{key(n)}.oft_R.weight": r for n, r in rows.items()}
    if scaled:
        tensors |= {f"{key(n)}.oft_R.scaled_oft": torch.tensor(True) for n in LAYERS}
    file = write(tmp_path / "a.safetensors", tensors)
    assert oftfx.adapter_convention(file) == "oft_v2"
    ours = oftfx.load_adapter(net(), file)
    assert rel(outputs(ours), expected(rows, scaled=scaled)) <= 1e-6
    assert apart(ours) > 0.05
    assert oftfx.adapters(ours)["default"]["conv_in"].spec.block_share is shared


def test_written_by_the_formula(tmp_path):
    model = randomize(oftfx.transform(net(), {"*": OFT(4)}), std=0.1).eval()
    written = load_file(oftfx.save_adapter(model, tmp_path / "a.safetensors", convention="oft_v2"))
    rows = {n: written[f"{key(n)}.oft_R.weight"] for n in LAYERS}
    assert len(written) == len(rows)
    assert rel(outputs(model), expected(rows)) <= 1e-6
    assert torch.equal(outputs(oftfx.load_adapter(net(), tmp_path / "a.safetensors")), outputs(model))


def test_a_convolution_turns_the_other_way_than_in_peft(tmp_path):
    """Same key, same numbers: PEFT's file and OneTrainer's agree at a Linear and not at a Conv2d."""
    model = randomize(oftfx.transform(net(), {"*": OFT(4)}), std=0.1).eval()
    oftfx.save_adapter(model, tmp_path / "a.safetensors", convention="oft_v2")
    with pytest.warns(UserWarning, match="PEFT cannot use this adapter"):
        oftfx.save_adapter(model, tmp_path / "peft")
    theirs = load_file(tmp_path / "peft/adapter_model.safetensors")
    for name, rows in load_file(tmp_path / "a.safetensors").items():
        layer = next(n for n in LAYERS if name == f"{key(n)}.oft_R.weight")
        same = theirs[f"base_model.model.{layer}.oft_R.weight"]
        assert torch.equal(rows, -same if layer in CONVOLUTIONS else same)


def test_a_noted_bound_on_norms_acts(tmp_path):
    rows = {"proj": numbers("proj"), "blocks.0.to_q": numbers("blocks.0.to_q")}
    tensors = {f"{key(n)}.oft_R.weight": r for n, r in rows.items()}
    notes = {"ss_network_module": "networks.oft_v2", "ss_network_args": {"coft": "True", "coft_eps": "0.2"}}
    ours = oftfx.load_adapter(net(), write(tmp_path / "a.safetensors", tensors, **notes))
    clipped = {}
    for name, r in rows.items():
        limit = 0.2 / math.sqrt(len(r))
        norms = [math.sqrt(2 * float(v.double().square().sum())) for v in r]
        assert any(n > limit for n in norms)
        clipped[name] = torch.stack([v.double() * min(1, limit / n) for v, n in zip(r, norms, strict=True)])
    assert rel(outputs(ours), expected(clipped)) <= 1e-6
    oftfx.save_adapter(ours, tmp_path / "b.safetensors", convention="oft_v2")
    assert rel(outputs(oftfx.load_adapter(net(), tmp_path / "b.safetensors")), outputs(ours)) <= 1e-6


@pytest.mark.parametrize(
    ("tensors", "notes", "message"),
    [
        ({"oft_R.scaled_oft": torch.tensor(1)}, {}, "trial version of OneTrainer"),
        ({"oft_R.scaled_oft": torch.tensor(True)}, {"ss_network_args": {"coft": "True"}}, "no tool writes both"),
        ({}, {"ss_network_args": "{"}, "ss_network_args in its metadata is damaged"),
        ({}, {"ss_network_args": {"coft": "1", "coft_eps": "x"}}, "ss_network_args in its metadata is damaged"),
        ({"oft_R.weight": torch.ones(2, 5)}, {}, r"has shape \(2, 5\)"),
        ({"oft_R.weight": torch.ones(3, 6)}, {}, r"has shape \(3, 6\)"),
        ({"oft_R.weight": torch.ones(6)}, {}, r"has shape \(6,\)"),
        ({"oft_R.weight": torch.ones(0, 0)}, {}, r"has shape \(0, 0\)"),
        ({"alpha": torch.ones(())}, {}, "alpha is nothing that convention 'oft_v2' knows"),
    ],
    ids=str,
)
def test_refused_by_name(tmp_path, tensors, notes, message):
    found = {"lora_unet_proj.oft_R.weight": numbers("proj"), **{f"lora_unet_proj.{k}": v for k, v in tensors.items()}}
    with pytest.raises(AdapterFileError, match=message):
        oftfx.load_adapter(net(), write(tmp_path / "a.safetensors", found, **notes))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (OFT(4, parameterization="cayley"), "has a series of five terms, this rotation is cayley"),
        (OFT(4, terms=7), "cayley_neumann with 7"),
        (OFT(4, parameterization="cayley_neumann_016"), "cayley_neumann_016"),
    ],
)
def test_another_series_is_not_written(tmp_path, spec, message):
    with pytest.raises(AdapterError, match=message):
        oftfx.save_adapter(oftfx.transform(net(), {"proj": spec}), tmp_path / "a.safetensors", convention="oft_v2")


def test_what_the_writers_refuse_is_not_written(tmp_path):
    grouped = oftfx.transform(torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=2)), {"*": OFT(4)})
    with pytest.raises(AdapterError, match="groups=2"):
        oftfx.save_adapter(grouped, tmp_path / "a.safetensors", convention="oft_v2")
    embedding = oftfx.transform(torch.nn.Sequential(torch.nn.Embedding(7, 8)), {"*": OFT(4)})
    with pytest.raises(AdapterError, match=r"Embedding \(embedding\); convention 'oft_v2' knows linear, conv2d"):
        oftfx.save_adapter(embedding, tmp_path / "a.safetensors", convention="oft_v2")
    with pytest.raises(AdapterError, match="one file; give it a name that ends with .safetensors"):
        oftfx.save_adapter(oftfx.transform(net(), {"*": OFT(4)}), tmp_path / "a", convention="oft_v2")
