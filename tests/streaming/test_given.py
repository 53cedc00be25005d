"""Adapters of other tools in a fold of files: what a fold in memory of the same file writes, to the bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError, AdapterFileError, FoldError
from tests.adapter.conventions.models import spread
from tests.adapter.conventions.published import write
from tests.cli.command import run
from tests.reference import randomize
from tests.streaming.compare import assert_same, note, tensors

pytestmark = [pytest.mark.needs("transformers"), pytest.mark.filterwarnings("ignore:.*other code reads:UserWarning")]

SITES = {"self_attn.q_proj": 64, "self_attn.k_proj": 32, "mlp.gate_proj": 96, "mlp.down_proj": 64}
"""Rows of the layers."""


@pytest.fixture
def base(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="40KB")
    return tmp_path / "base"


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


def same_as_in_memory(base, adapter, tmp_path, **options):
    """Fold both ways, and compare with the base as well: something has to have moved."""
    result = oftfx.fold(oftfx.load_adapter(load(base), adapter, **options))
    result.save(tmp_path / "memory")
    report = oftfx.fold_checkpoint(base, adapter, tmp_path / "out", **options)
    assert_same(tmp_path / "out", tmp_path / "memory")
    assert report.sites == result.report.sites
    assert note(tmp_path / "out")["folds"] == note(tmp_path / "memory")["folds"]
    before, after = tensors(base), tensors(tmp_path / "out")
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert {n.removesuffix(".weight") for n in moved} == {s.fqn for s in report}
    return report


@pytest.mark.parametrize("convention", ["peft-0.14", "peft-0.16", "diffusers", "oft_v2"])
def test_rotations_of_what_is_read(base, tmp_path, convention):
    spec = OFT(16, parameterization="cayley" if convention.startswith("peft") else "cayley_neumann")
    model = randomize(oftfx.transform(load(base), {"*.q_proj": spec, "*.down_proj": spec}))
    path = tmp_path / ("a" if convention.startswith("peft") else "a.safetensors")
    oftfx.save_adapter(model, path, convention=convention)
    assert oftfx.adapter_convention(path) == convention
    same_as_in_memory(base, path, tmp_path)


def of_outputs(path, prefix, separator, alpha=100.0, width=0.1, **notes):
    """A file of blocks ``(k, 8, 8)`` that rotate rows."""
    made = {}
    for layer in range(2):
        for index, (site, rows) in enumerate(SITES.items()):
            key = f"{prefix}{separator}" + f"model.layers.{layer}.{site}".replace(".", separator)
            made[f"{key}.oft_blocks"] = spread((rows // 8, 8, 8), 8 * layer + index, width).float()
            made[f"{key}.alpha"] = torch.tensor(alpha)
    return write(path, made, **notes)


@pytest.mark.parametrize("convention", ["kohya", "lycoris", "comfyui"])
def test_rotations_of_what_is_given_out(base, tmp_path, convention):
    kinds = {
        "kohya": ("oft_unet", "_", {"ss_network_module": "networks.oft"}),
        "lycoris": ("lycoris", "_", {}),
        "comfyui": ("diffusion_model", ".", {}),
    }
    prefix, separator, notes = kinds[convention]
    file = of_outputs(tmp_path / "a.safetensors", prefix, separator, 0.0 if convention == "lycoris" else 100.0, **notes)
    assert oftfx.adapter_convention(file) == convention
    assert len(same_as_in_memory(base, file, tmp_path)) == 8


def test_a_file_that_leaves_a_choice_and_its_parts(base, tmp_path):
    """Two models in one file, and nothing that says whose it is."""
    first, second = (
        of_outputs(tmp_path / f"{n}.safetensors", n, "_", width=w) for n, w in (("lora_te1", 0.1), ("lora_te2", 0.2))
    )
    file = tmp_path / "both.safetensors"
    save_file(load_file(first) | load_file(second), file, {"ss_network_module": "networks.oft"})
    options = {"convention": "lycoris", "part": "lora_te2"}
    with pytest.raises(AdapterFileError, match="fit several conventions"):
        oftfx.fold_checkpoint(base, file, tmp_path / "out")
    with pytest.raises(AdapterError, match="several parts of this file fit"):
        oftfx.fold_checkpoint(base, file, tmp_path / "out", convention="lycoris")
    with pytest.raises(AdapterError, match="expected one of"):
        oftfx.fold_checkpoint(base, file, tmp_path / "out", convention="kohia")
    assert not (tmp_path / "out").exists()
    same_as_in_memory(base, file, tmp_path, **options)


@pytest.mark.needs("bitsandbytes")
def test_rotations_of_what_is_given_out_need_floats(base, tmp_path):
    assert run("quantize", base, tmp_path / "nf4", "--to", "nf4").status == 0
    file = of_outputs(tmp_path / "a.safetensors", "diffusion_model", ".")
    with pytest.raises(AdapterError, match="so its weight has to be plain floats, and this Linear4bit stores bnb4"):
        oftfx.fold_checkpoint(tmp_path / "nf4", file, tmp_path / "out")


@pytest.mark.needs("peft", "typer", "rich")
@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.*more than rotations:UserWarning")
def test_reflections_are_in_memory(base, tmp_path):
    import peft

    for r, path in ((2, "even"), (3, "odd")):
        theirs = peft.get_peft_model(load(base), peft.HRAConfig(r=r, target_modules=["q_proj", "down_proj"]))
        for index, (name, parameter) in enumerate(theirs.named_parameters()):
            if "hra_u" in name:
                parameter.data += spread(parameter.shape, index, 0.2).float()
        theirs.save_pretrained(tmp_path / path)
    same_as_in_memory(base, tmp_path / "even", tmp_path)
    message = (
        r"odd: more than rotations \(scales of rows, or reflections\) for 4 weights, e\.g\. model\.layers\.0\.self"
    )
    with pytest.raises(FoldError, match=message):
        oftfx.fold_checkpoint(base, tmp_path / "odd", tmp_path / "no")
    assert not (tmp_path / "no").exists()
    result = oftfx.fold(oftfx.load_adapter(load(base), tmp_path / "odd"))
    result.save(tmp_path / "again")
    done = run("fold", base, tmp_path / "odd", tmp_path / "no", "--json")
    assert done.status == 0, done.err
    assert "which is said by the weights themselves" in done.err
    assert "It is folded in memory now" in done.err
    assert len(json.loads(done.out)["sites"]) == 4
    assert_same(tmp_path / "no", tmp_path / "again")


def test_a_checkpoint_of_a_trainer_has_no_rules(base, tmp_path):
    oftfx.transform(load(base), {"*.q_proj": OFT(16)}).save_pretrained(tmp_path / "trained")
    with pytest.raises(
        AdapterError, match=r"make an adapter of it first: oftfx convert BASE CHECKPOINT ADAPTER --rule"
    ):
        oftfx.fold_checkpoint(base, tmp_path / "trained", tmp_path / "out")
