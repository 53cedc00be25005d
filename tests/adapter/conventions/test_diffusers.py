"""diffusers' own save of a PEFT adapter, both ways; and names with dots whose meaning is not clear."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError, AdapterFileError, OftfxWarning
from tests.adapter.conventions.models import net, outputs, spread
from tests.adapter.conventions.published import write
from tests.reference import randomize, rel

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()


def sample(model):
    generator = torch.Generator().manual_seed(1)
    inputs = (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([3, 7]),
        torch.randn(2, 5, 12, generator=generator),
    )
    with torch.no_grad():
        return model(*inputs).sample


@pytest.mark.needs("diffusers", "peft")
@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"use_cayley_neumann": False, "block_share": True}], ids=str)
def test_what_diffusers_saves(tmp_path, options):
    import peft

    theirs = unet()
    config = peft.OFTConfig(oft_block_size=4, target_modules=TARGETS, **options)
    theirs.add_adapter(config)
    for index, (name, parameter) in enumerate(theirs.named_parameters()):
        if "oft_R" in name:
            parameter.data = spread(parameter.shape, index, 0.15).float()
    expected = sample(theirs)
    theirs.save_lora_adapter(tmp_path / "theirs")
    assert oftfx.adapter_convention(tmp_path / "theirs") == "diffusers"
    ours = oftfx.load_adapter(unet(), tmp_path / "theirs")
    assert rel(sample(ours), expected) <= 1e-6
    assert rel(sample(unet()), expected) > 0.01
    file = oftfx.save_adapter(ours, tmp_path / "ours.safetensors", convention="diffusers")
    again = unet()
    again.add_adapter(config)
    peft.set_peft_model_state_dict(again, load_file(file))
    assert rel(sample(again), expected) <= 1e-6
    noted = json.loads(dict(_notes(file))["lora_adapter_metadata"])
    assert {k: noted[k] for k in ("peft_type", "oft_block_size")} == {"peft_type": "OFT", "oft_block_size": 4}


def _notes(file):
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def test_names_with_dots_and_no_configuration_may_be_of_two_tools(tmp_path):
    rows = spread((2, 6), 1, 0.2).float()
    file = write(tmp_path / "a.safetensors", {"unet.conv_in.oft_R.weight": spread((9, 6), 1, 0.2).float()})
    with pytest.raises(AdapterFileError, match=r"fit several.*'diffusers' .*'oft_v2'"):
        oftfx.load_adapter(net(), file)
    one = oftfx.load_adapter(net(), file, convention="diffusers")
    other = oftfx.load_adapter(net(), file, convention="oft_v2")
    assert rel(outputs(one), outputs(other)) > 0.01  # a convolution turns the other way
    noted = write(tmp_path / "b.safetensors", {"unet.proj.oft_R.weight": rows}, ss_network_module="networks.oft_v2")
    assert oftfx.adapter_convention(noted) == "oft_v2"


def test_a_configuration_of_a_pipeline_stands_behind_the_name_of_the_part(tmp_path):
    rows = spread((2, 6), 1, 0.2).float()
    note = {"unet.peft_type": "OFT", "unet.peft_version": "0.21.2", "unet.use_cayley_neumann": False}
    ours = oftfx.load_adapter(
        net(), write(tmp_path / "a.safetensors", {"unet.proj.oft_R.weight": rows}, lora_adapter_metadata=note)
    )
    assert oftfx.adapters(ours)["default"]["proj"].spec.parameterization == "cayley"
    for damaged in ("{", "[1]", {"peft_type": "LORA"}, {"unet.peft_type": "OFT", "vae.peft_type": "OFT"}):
        file = write(tmp_path / "b.safetensors", {"unet.proj.oft_R.weight": rows}, lora_adapter_metadata=damaged)
        with pytest.raises(AdapterFileError, match="lora_adapter_metadata in its metadata is"):
            oftfx.load_adapter(net(), file)


def test_several_parts_in_one_file(tmp_path):
    rows = spread((2, 6), 1, 0.2).float()
    tensors = {"lora_unet_proj.oft_R.weight": rows, "lora_te_text_model_fc1.oft_R.weight": rows}
    with pytest.warns(OftfxWarning, match=r"also rotates 1 layers of another model \(lora_te_\*\)"):
        oftfx.load_adapter(net(), write(tmp_path / "a.safetensors", tensors))
    both = {"lora_te1_proj.oft_R.weight": rows, "lora_te2_proj.oft_R.weight": -rows}
    file = write(tmp_path / "b.safetensors", both)
    with pytest.raises(AdapterFileError, match=r"several parts .* 'lora_te1_', 'lora_te2_'.*part='lora_te1_'"):
        oftfx.load_adapter(net(), file)
    with warnings.catch_warnings(record=True):
        first, second = (oftfx.load_adapter(net(), file, part=p) for p in ("lora_te1", "lora_te2_"))
    assert rel(outputs(first), outputs(second)) > 0.01
    with pytest.raises(AdapterFileError, match="no key begins with part='lora_te3'"):
        oftfx.load_adapter(net(), file, part="lora_te3")


def test_paths_that_differ_in_dots_only_are_an_error_with_the_choices(tmp_path):
    class Twins(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a_b = torch.nn.Linear(8, 8)
            self.a = torch.nn.ModuleDict({"b": torch.nn.Linear(8, 8)})

    file = write(tmp_path / "a.safetensors", {"lora_unet_a_b.oft_R.weight": spread((2, 6), 1, 0.2).float()})
    with pytest.raises(AdapterError, match=r"lora_unet_a_b could be any of a_b, a\.b: their paths differ in dots only"):
        oftfx.load_adapter(Twins(), file)
    model = randomize(oftfx.transform(Twins(), {"*": OFT(4)}))
    with pytest.raises(AdapterError, match="another path has the same name without dots"):
        oftfx.save_adapter(model, tmp_path / "b.safetensors", convention="oft_v2")
