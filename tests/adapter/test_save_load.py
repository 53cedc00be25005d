import json

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load, save_file

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError, AdapterFileError
from tests.reference import randomize

KEY = "base_model.model.0.oft_R.weight"


def base(n=24):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n, 10), nn.Linear(10, 6))


@pytest.fixture
def saved(tmp_path):
    model = randomize(oftfx.transform(base(), {"0": OFT(8)}))
    oftfx.save_adapter(model, tmp_path)
    return tmp_path


def rewrite(folder, change):
    tensors = load((folder / "adapter_model.safetensors").read_bytes())
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def reconfigure(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


FAULTS = [
    (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        AdapterFileError,
        "no file .*adapter_model.safetensors",
    ),
    (lambda f: (f / "adapter_config.json").unlink(), AdapterFileError, "no file .*adapter_config.json"),
    (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]),
        AdapterFileError,
        "damaged or not a safetensors file",
    ),
    (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"PK\x03\x04junk"),
        AdapterFileError,
        "damaged or not",
    ),
    (lambda f: (f / "adapter_config.json").write_text("{"), AdapterFileError, "not a JSON object"),
    (lambda f: (f / "adapter_config.json").write_text("[1]"), AdapterFileError, "not a JSON object"),
    (lambda f: reconfigure(f, peft_type="LORA"), AdapterFileError, "peft_type is 'LORA', expected 'OFT'"),
    (
        lambda f: rewrite(f, lambda t: t.update({"base_model.model.0.lora_A.weight": torch.zeros(2)})),
        AdapterFileError,
        r"0\.lora_A\.weight' \(lora_A\) is not of PEFT's OFT format",
    ),
    (
        lambda f: rewrite(f, lambda t: t.update({"base_model.model.0.oft_r": torch.zeros(2)})),
        AdapterFileError,
        "mixes several: convention='peft' .*, convention='peft-0.14'",
    ),
    (
        lambda f: rewrite(f, lambda t: t.update({"oft_unet_x.oft_blocks": torch.zeros(2)})),
        AdapterFileError,
        "mixes several: convention='peft' .*, convention='kohya'",
    ),
    (
        lambda f: rewrite(f, lambda t: t.update({"base_model.model.1.bias": t.pop(KEY)})),
        AdapterFileError,
        "no key is of an adapter of rotations",
    ),
    (
        lambda f: rewrite(f, lambda t: t[KEY].view(-1)[3:5].fill_(torch.nan)),
        AdapterFileError,
        f"{KEY} holds 2 of 84 numbers",
    ),
    (
        lambda f: rewrite(f, lambda t: t.update({KEY: t[KEY].int()})),
        AdapterFileError,
        "has dtype torch.int32",
    ),
    (
        lambda f: rewrite(f, lambda t: t.update({KEY: t[KEY][:2].clone()})),
        AdapterError,
        r"0: skew of shape \(2, 28\) does not fit in_features 24",
    ),
    (
        lambda f: rewrite(f, lambda t: t.update({KEY: t[KEY][:, :27].clone()})),
        AdapterError,
        r"27 is not b\(b-1\)/2",
    ),
    (
        lambda f: rewrite(f, lambda t: t.update({"base_model.model.first.oft_R.weight": t.pop(KEY)})),
        AdapterError,
        "rotates first, which is no layer of Sequential",
    ),
    (
        lambda f: rewrite(f, lambda t: t.update({"base_model.model.1.weight": torch.zeros(3, 3)})),
        AdapterError,
        r"1\.weight has shape \(3, 3\), the model's \(6, 10\)",
    ),
    (
        lambda f: rewrite(f, lambda t: t.update({"base_model.model.2.weight": torch.zeros(3)})),
        AdapterError,
        "holds 2.weight",
    ),
]


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize(("damage", "kind", "message"), FAULTS, ids=[m for _, _, m in FAULTS])
def test_bad_files_are_refused_before_anything_changes(saved, damage, kind, message, transformed):
    damage(saved)
    model = oftfx.transform(base(), {"0": OFT(8)}) if transformed else base()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(kind, match=message):
        oftfx.load_adapter(model, saved)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_adapter_of_another_model_names_the_module(saved):
    with pytest.raises(AdapterError, match=r"0: skew of shape \(3, 28\) does not fit in_features 32.*another model"):
        oftfx.load_adapter(base(32), saved)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (OFT(4), "block_size is 4 in the model and 8 in the file"),
        (OFT(8, terms=7), "terms is 7 in the model and 5 in the file"),
        (OFT(8, parameterization="cayley"), "parameterization is cayley in the model"),
        (OFT(8, coft_eps=0.1), "coft_eps is 0.1 in the model and None"),
    ],
)
def test_loading_into_an_adapter_with_another_meaning_is_refused(saved, spec, message):
    model = oftfx.transform(base(), {"0": spec})
    with pytest.raises(AdapterError, match=message):
        oftfx.load_adapter(model, saved)
    oftfx.load_adapter(model, saved, adapter="other")
    assert list(oftfx.adapters(model)) == ["default", "other"]
    assert oftfx.active_adapters(model) == ("default",)


def test_loading_into_an_adapter_on_other_sites_is_refused(saved):
    model = oftfx.transform(base(), {"0": OFT(8), "1": OFT(5)})
    with pytest.raises(AdapterError, match="1 sites are rotated on one side only, e.g. 1 in the model"):
        oftfx.load_adapter(model, saved)


def test_loading_into_a_shared_rotation_needs_equal_numbers(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            return self.a(x) + self.b(x)

    oftfx.save_adapter(randomize(oftfx.transform(Pair(), {"*": OFT(4)})), tmp_path)
    shared = oftfx.transform(Pair(), {"*": OFT(4, share_input=True)}, example_inputs=(torch.randn(2, 8),))
    assert len(oftfx.adapter_parameters(shared)) == 1
    with pytest.raises(
        AdapterError, match="b shares the rotation of a in the model, but the file has different numbers"
    ):
        oftfx.load_adapter(shared, tmp_path)


def test_values_go_into_the_adapter_that_is_there(saved):
    source = randomize(oftfx.transform(base(), {"0": OFT(8)}))
    model = oftfx.transform(base(), {"0": OFT(8)})
    x = torch.randn(3, 24)
    model.eval()(x)
    assert oftfx.load_adapter(model, saved) is model
    assert torch.equal(model(x), source(x))
    assert all(p.requires_grad for p in oftfx.adapter_parameters(model))


def test_a_loaded_adapter_is_frozen_unless_asked(saved):
    assert not any(p.requires_grad for p in oftfx.load_adapter(base(), saved).parameters())
    model = oftfx.load_adapter(base(), saved, trainable=True)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.oft.default.skew"]


def test_saving_again_writes_the_same_bytes_and_no_half_files(saved, tmp_path):
    first = {p.name: p.read_bytes() for p in saved.iterdir()}
    assert sorted(first) == ["adapter_config.json", "adapter_model.safetensors"]
    for _ in range(8):  # safetensors itself writes the metadata in an order of its own each time
        oftfx.save_adapter(oftfx.load_adapter(base(), saved), tmp_path / "again")
        assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == first


def test_unknown_names(tmp_path):
    model = oftfx.transform(base(), {"0": OFT(8)})
    with pytest.raises(AdapterError, match="no adapter 'x'; the model has default"):
        oftfx.save_adapter(model, tmp_path, adapter="x")
    with pytest.raises(AdapterError, match="convention: got 'kohia', expected one of peft, oftfx, .*kohya"):
        oftfx.save_adapter(model, tmp_path, convention="kohia")
    with pytest.raises(AdapterError, match="Sequential has no adapters"):
        oftfx.save_adapter(base(), tmp_path)


@pytest.mark.parametrize("convention", ["peft", "oftfx"])
def test_a_file_that_lacks_a_site_is_refused(tmp_path, convention):
    model = randomize(
        oftfx.transform(base(), {"0": OFT(8), "1": OFT(5)} if convention == "oftfx" else {"0": OFT(2), "1": OFT(2)})
    )
    oftfx.save_adapter(model, tmp_path, convention=convention)
    rewrite(tmp_path, lambda t: t.pop("base_model.model.1.oft_R.weight"))
    with pytest.raises(AdapterFileError, match="no rotation for 1, which .*json names; is the file complete"):
        oftfx.load_adapter(base(), tmp_path)


def test_saving_in_another_convention_leaves_no_stale_meaning(tmp_path):
    exact = randomize(oftfx.transform(base(), {"0": OFT(8, parameterization="cayley")}))
    series = randomize(oftfx.transform(base(), {"0": OFT(8)}))
    x = torch.randn(3, 24)
    for first, second in ((exact, series), (series, exact)):
        oftfx.save_adapter(first, tmp_path, convention="oftfx")
        oftfx.save_adapter(second, tmp_path)
        assert torch.equal(oftfx.load_adapter(base(), tmp_path)(x), second(x))
        oftfx.save_adapter(first, tmp_path, convention="oftfx")
        assert torch.equal(oftfx.load_adapter(base(), tmp_path)(x), first(x))


def test_a_failing_insertion_leaves_the_model_as_it_was(saved):
    model = base()
    model[0].add_module("oft", nn.Identity())
    with pytest.raises(AdapterError, match="0 has a child 'oft' of its own"):
        oftfx.load_adapter(model, saved)
    with pytest.raises(AdapterError, match="0 has a child 'oft' of its own"):
        oftfx.transform(model, {"*": OFT(2)}, inplace=True)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_loading_into_a_wrapped_base_reaches_the_model(saved):
    model = base()
    compiled = torch.compile(model, backend="eager")
    oftfx.load_adapter(compiled, saved)
    assert list(oftfx.adapters(model)) == ["default"]
    x = torch.randn(3, 24)
    assert torch.equal(model(x), oftfx.load_adapter(base(), saved)(x))
