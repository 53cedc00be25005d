"""Which convention a file has, for each of them; and files that nobody should trust."""

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file

import oftfx
from oftfx import OFT
from oftfx.adapter.conventions.registry import CONVENTIONS, convention_named
from oftfx.errors import AdapterError, AdapterFileError, OftfxError
from tests.adapter.conventions.models import net
from tests.adapter.conventions.published import write

BLOCKS, ROWS = torch.zeros(4, 2, 2), torch.zeros(2, 6)
KEYS = [
    ({"lora_unet_proj.oft_blocks": BLOCKS}, {}, None, "lycoris"),
    ({"lycoris_proj.oft_blocks": BLOCKS[None]}, {}, None, "lycoris"),
    ({"lora_te1_x.oft_blocks": BLOCKS, "lora_te1_x.alpha": torch.ones(())}, {}, None, "lycoris"),
    ({"own_proj.oft_blocks": BLOCKS}, {"ss_network_module": "lycoris.kohya"}, None, "lycoris"),
    ({"oft_unet_proj.oft_blocks": BLOCKS}, {}, None, "kohya"),
    ({"own_proj.oft_blocks": BLOCKS}, {"ss_network_module": "networks.oft"}, None, "kohya"),
    ({"diffusion_model.proj.oft_blocks": BLOCKS}, {}, None, "comfyui"),
    ({"lora_unet_proj.oft_R.weight": ROWS}, {}, None, "oft_v2"),
    ({"unet.proj.oft_R.weight": ROWS, "unet.proj.oft_R.scaled_oft": torch.tensor(True)}, {}, None, "oft_v2"),
    ({"proj.oft_R.weight": ROWS}, {"lora_adapter_metadata": {"peft_type": "OFT"}}, None, "diffusers"),
    ({"lora_unet_proj.boft_R": BLOCKS[None]}, {}, None, "sd-scripts-boft"),
    ({"base_model.model.proj.boft_R": BLOCKS[None]}, {}, {"peft_type": "BOFT"}, "peft-boft"),
    ({"base_model.model.proj.hra_u": torch.ones(8, 2)}, {}, {"peft_type": "HRA"}, "peft-hra"),
    ({"base_model.model.proj.oft_r": BLOCKS}, {}, {"peft_type": "OFT"}, "peft-0.14"),
    ({"base_model.model.proj.oft_R.weight": ROWS}, {}, {"peft_type": "OFT"}, "peft-0.16"),
    ({"base_model.model.proj.oft_R.weight": ROWS}, {}, {"peft_type": "OFT", "peft_version": "0.17.1"}, "peft-0.16"),
    ({"base_model.model.proj.oft_R.weight": ROWS}, {}, {"peft_type": "OFT", "peft_version": "0.18.0.dev0"}, "peft"),
    ({"base_model.model.proj.oft_R.weight": ROWS}, {}, {"peft_type": "OFT", "peft_version": "1.0"}, "peft"),
    ({"proj.weight": ROWS, "proj.oft.mine.skew": ROWS}, {}, None, "checkpoint"),
]


@pytest.mark.parametrize(
    ("tensors", "notes", "config", "name"), KEYS, ids=[f"{n}-{i}" for i, (*_, n) in enumerate(KEYS)]
)
def test_told_from_keys_notes_and_configuration(tmp_path, tensors, notes, config, name):
    write(tmp_path / "adapter_model.safetensors", tensors, **notes)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert oftfx.adapter_convention(tmp_path) == name
    assert oftfx.adapter_convention(tmp_path / "adapter_model.safetensors") == name


def test_every_convention_is_told_from_some_file(tmp_path):
    oftfx.save_adapter(oftfx.transform(net(), {"proj": OFT(4)}), tmp_path, convention="oftfx")
    assert oftfx.adapter_convention(tmp_path) == "oftfx"
    assert {n for *_, n in KEYS} | {"oftfx"} == set(CONVENTIONS)


def test_unknown_convention_and_no_adapter(tmp_path):
    with pytest.raises(AdapterError, match="convention: got 'x', expected one of peft, oftfx"):
        convention_named("x")
    with pytest.raises(AdapterFileError, match=r"no key is of an adapter of rotations; the first is 'a"):
        oftfx.adapter_convention(write(tmp_path / "a.safetensors", {"a.lora_A.weight": ROWS}))
    with pytest.raises(AdapterFileError, match="it has none"):
        oftfx.adapter_convention(write(tmp_path / "b.safetensors", {}))
    with pytest.raises(
        AdapterFileError, match=r"2 safetensors files.*a\.safetensors, b\.safetensors\. Give the path of one"
    ):
        oftfx.adapter_convention(tmp_path)
    for name in ("nothing", "nothing.safetensors"):
        with pytest.raises(AdapterFileError, match="no file .*nothing"):
            oftfx.load_adapter(net(), tmp_path / "sub" / name)


def test_a_name_of_the_hub_is_answered_with_the_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterFileError, match=r"huggingface_hub\.snapshot_download\('someone/oft-of-7b'\)"):
        oftfx.load_adapter(net(), "someone/oft-of-7b")


@pytest.mark.parametrize("name", ["adapter_model.bin", "x.pt", "x.ckpt", "x.pth"])
def test_a_pickle_is_never_opened(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        AdapterFileError, match=r"a pickle, which can run any code.*torch\.load\(path, weights_only=True\)"
    ):
        oftfx.load_adapter(net(), tmp_path / name)
    if name.startswith("adapter_model"):
        with pytest.raises(AdapterFileError, match="a pickle"):
            oftfx.load_adapter(net(), tmp_path)


def header(tensors):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


HUGE = {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 8,
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        header({"proj.oft_R.weight": HUGE}),
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}) + b"1234",
        header({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}) + b"1234",
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + b"1234",
    ],
    ids=range(8),
)
def test_damaged_headers(tmp_path, data):
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(AdapterFileError, match="damaged or not a safetensors file"):
        oftfx.load_adapter(net(), tmp_path / "a.safetensors")


def test_sizes_are_compared_with_the_model_before_memory_is_taken(tmp_path, monkeypatch):
    from oftfx.adapter import from_file
    from oftfx.adapter.conventions.source import Source

    def refuse(*_):
        pytest.fail("read a tensor that cannot be of this model")

    large = torch.zeros(300, 190)
    monkeypatch.setattr(Source, "tensors", refuse)
    monkeypatch.setattr(from_file, "read_weights", refuse)
    for key in ("lora_unet_proj.oft_R.weight", "base_model.model.proj.oft_R.weight"):
        save_file({key: large}, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "OFT", "peft_version": "0.21.2"}')
        with pytest.raises(AdapterFileError, match=r"has shape \(300, 190\)"):
            oftfx.load_adapter(net(), tmp_path)
    many = {f"base_model.model.layer{i}.oft_R.weight": torch.zeros(30, 40) for i in range(40)}
    save_file(many, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match="has 48,000 numbers, more than Net and all rotations"):
        oftfx.load_adapter(net(), tmp_path)
    others = {
        "lora_unet_proj.oft_blocks": torch.zeros(64, 30, 30),
        "lora_unet_proj.boft_R": torch.zeros(1, 64, 30, 30),
        "base_model.model.proj.hra_u": torch.zeros(64, 900),
        "base_model.model.proj.boft_R": torch.zeros(1, 64, 30, 30),
        "base_model.model.proj.oft_r": torch.zeros(64, 30, 30),
    }
    for key, tensor in others.items():
        save_file({key: tensor}, tmp_path / "adapter_model.safetensors")
        kind = {"hra_u": "HRA", "boft_R": "BOFT"}.get(key.rpartition(".")[2], "OFT")
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        with pytest.raises(AdapterFileError, match=r"has shape \((1, )?64"):
            oftfx.load_adapter(net(), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        "[1]",
        "{",
        "null",
        '{"peft_type": 5}',
        '{"peft_type": "OFT", "peft_version": 5}',
        '{"peft_type": "OFT", "peft_version": "0.21.2", "r": "x"}',
        '{"peft_type": "OFT", "peft_version": "0.21.2", "block_share": "no"}',
        '{"peft_type": "OFT", "peft_version": "0.21.2", "module_dropout": [0.1]}',
        '{"peft_type": "OFT", "peft_version": "0.21.2", "num_cayley_neumann_terms": "many"}',
        '{"peft_type": "OFT", "peft_version": "0.21.2", "coft": true, "eps": "x"}',
        '{"peft_type": "OFT", "peft_version": "0.21.2", "target_modules": "("}',
        '{"peft_type": "OFT", "peft_version": "0.21.2", "target_modules": 7}',
        '{"peft_type": "OFT", "peft_version": "0.21.2", "modules_to_save": 7}',
        "[" * 100_000,
    ],
    ids=range(14),
)
@pytest.mark.parametrize("key", ["oft_R.weight", "oft_r"])
def test_odd_configurations_end_in_an_error_of_ours(tmp_path, config, key):
    numbers = ROWS if key == "oft_R.weight" else torch.zeros(2, 4, 4)
    write(tmp_path / "adapter_model.safetensors", {f"base_model.model.proj.{key}": numbers})
    (tmp_path / "adapter_config.json").write_text(config)
    model = net()
    with pytest.raises(OftfxError):
        oftfx.load_adapter(model, tmp_path)
    assert not any("oft" in n for n, _ in model.named_modules())
