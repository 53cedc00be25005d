"""Both ways against the real package."""

import json

import pytest
import torch
from safetensors.torch import load, save_file

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError
from tests.reference import randomize, rel

pytestmark = [
    pytest.mark.needs("peft", "transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
peft = pytest.importorskip("peft")


def randomized_peft(base, std=0.05, **config):
    model = peft.get_peft_model(base, peft.OFTConfig(**config)).eval()
    for name, parameter in model.named_parameters():
        if ".oft_R." in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


CONFIGS = [
    *({"use_cayley_neumann": True, "num_cayley_neumann_terms": n} for n in range(2, 9)),
    {"use_cayley_neumann": False},
    {"block_share": True},
    {"block_share": True, "use_cayley_neumann": False},
    {"coft": True, "eps": 0.2},
    {"oft_block_size": 0, "r": 2},
    {"oft_block_size": 5},  # divides nothing: PEFT silently uses 4
]


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_pefts_file_gives_pefts_logits_and_the_other_way_round(request, ids, tmp_path, kind, changes):
    make = request.getfixturevalue(f"tiny_{kind}")
    config = {"target_modules": "all-linear", "oft_block_size": 8, **changes}
    theirs = randomized_peft(make(), **config)
    expected = theirs(**ids()).logits
    assert rel(expected, make()(**ids()).logits) > 1e-3
    theirs.save_pretrained(tmp_path / "peft")
    ours = oftfx.load_adapter(make(), tmp_path / "peft")
    assert rel(ours(**ids()).logits, expected) <= 1e-6
    assert rel(oftfx.fold(ours).model(**ids()).logits, expected) <= 1e-5
    oftfx.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    assert rel(again(**ids()).logits, expected) <= 1e-6


@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24)])
@pytest.mark.parametrize("exact", [False, True])
def test_one_layer_on_2d_and_3d_inputs(shape, exact):
    base = torch.nn.Sequential(torch.nn.Linear(24, 7))
    theirs = randomized_peft(
        torch.nn.Sequential(base[0]), target_modules=["0"], oft_block_size=8, use_cayley_neumann=not exact
    )
    ours = oftfx.transform(base, {"0": OFT(8, parameterization="cayley" if exact else "cayley_neumann")}).eval()
    with torch.no_grad():
        ours[0].oft.default.skew.copy_(next(p for n, p in theirs.named_parameters() if "oft_R" in n))
    x = torch.randn(shape)
    assert rel(ours(x), theirs(x)) <= 1e-6


@pytest.mark.parametrize("bias", ["none", "oft_only", "all"])
def test_whole_modules_and_biases_travel_both_ways(tiny_llama, ids, tmp_path, bias):
    config = {"target_modules": ["q_proj"], "oft_block_size": 8, "bias": bias, "modules_to_save": ["lm_head"]}
    theirs = randomized_peft(tiny_llama(), **config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and ".oft_R." not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = theirs(**ids()).logits
    theirs.save_pretrained(tmp_path / "peft")
    ours = oftfx.load_adapter(tiny_llama(), tmp_path / "peft")
    assert rel(ours(**ids()).logits, expected) <= 1e-6
    oftfx.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    assert rel(again(**ids()).logits, expected) <= 1e-6


def test_target_names_are_short_where_they_select_the_same_sites(tiny_llama, tmp_path):
    model = oftfx.transform(tiny_llama(), {"*.q_proj": OFT(8), "*.down_proj": OFT(8)})
    oftfx.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [
        "down_proj",
        "q_proj",
    ]
    one = oftfx.transform(tiny_llama(), {"model.layers.1.*.q_proj": OFT(8)})
    oftfx.save_adapter(one, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert sum(".oft_R." in n for n, _ in loaded.named_parameters()) == 1


def test_shared_rotations_are_written_out_for_every_site(tiny_llama, ids, tmp_path):
    model = randomize(oftfx.transform(tiny_llama(), {"all-linear": OFT(8, share_input=True)}))
    oftfx.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert rel(theirs(**ids()).logits, model(**ids()).logits) <= 1e-6
    fresh = oftfx.transform(tiny_llama(), {"all-linear": OFT(8, share_input=True)})
    oftfx.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(**ids()).logits, model(**ids()).logits)


def test_mixed_settings_need_our_own_convention(tiny_llama, ids, tmp_path):
    rules = {
        "*.q_proj": OFT(8, share_input=True),
        "*.k_proj": OFT(8, share_input=True),
        "*.down_proj": OFT(16, dropout=0.1),
    }
    model = randomize(oftfx.transform(tiny_llama(), rules))
    with pytest.raises(
        AdapterError, match=r"PEFT's convention has one block_size .*down_proj differs.*convention='oftfx'"
    ):
        oftfx.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
    oftfx.save_adapter(model, tmp_path, convention="oftfx")
    again = oftfx.load_adapter(tiny_llama(), tmp_path)
    assert torch.equal(again(**ids()).logits, model(**ids()).logits)
    assert oftfx.adapters(again)["default"]["model.layers.0.self_attn.k_proj"].owner.endswith("q_proj")
    assert sum(p.numel() for p in oftfx.adapter_parameters(again)) == sum(
        p.numel() for p in oftfx.adapter_parameters(model)
    )


def test_files_of_peft_016_and_017_keep_their_meaning(tiny_llama, ids, tmp_path):
    spec = OFT(8, parameterization="cayley_neumann_016", terms=4)
    model = randomize(oftfx.transform(tiny_llama(), {"*.q_proj": spec}), std=0.1)
    oftfx.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "peft_version" not in config  # as those versions wrote it
    again = oftfx.load_adapter(tiny_llama(), tmp_path)
    assert torch.equal(again(**ids()).logits, model(**ids()).logits)
    weights = tmp_path / "adapter_model.safetensors"
    save_file(load(weights.read_bytes()), weights)  # PEFT's know nothing of their configuration
    config["peft_version"] = "0.21.2"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    today = oftfx.load_adapter(tiny_llama(), tmp_path)
    assert rel(today(**ids()).logits, model(**ids()).logits) > 1e-4
