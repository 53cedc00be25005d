import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import oftfx
from oftfx import OFT
from oftfx.opened import open_model
from tests.cli.command import run
from tests.reference import randomize

pytestmark = pytest.mark.needs("typer", "rich", "transformers", "tokenizers")


@pytest.fixture
def two(files):
    """Another adapter, of an exact parameterization like the first one here."""
    for name, seed in (("adapter", 3), ("other", 4)):
        model = oftfx.transform(open_model(files.base), {"all-linear": OFT(16, parameterization="cayley")})
        oftfx.save_adapter(randomize(model, seed=seed), files.tmp / f"{name}-exact")
    return files


def test_half_strength_is_half_the_angles(two):
    done = run("merge", two.base, two.out, "-a", f"{two.tmp / 'adapter-exact'}=0.5")
    assert done.status == 0, done.err
    whole = json.loads(run("diff", two.base, two.tmp / "adapter-exact", "--json").out)
    half = json.loads(run("diff", two.base, two.out, "--json").out)
    for a, b in zip(whole["sites"], half["sites"], strict=True):
        assert torch.allclose(torch.tensor(a["angles"]) / 2, torch.tensor(b["angles"]), atol=1e-5)
    apart = json.loads(run("diff", two.base, two.tmp / "adapter-exact", two.out, "--json").out)
    for site, a in zip(apart["sites"], whole["sites"], strict=True):
        length = math.sqrt(sum(x * x for block in a["angles"] for x in block))
        assert site["distance"] == pytest.approx(length / 2, rel=1e-3)
    assert "is no number" in run("merge", two.base, two.tmp / "x", "-a", "somewhere=half").err


@pytest.mark.needs("peft")
def test_the_nearest_lora_at_full_rank_is_the_fold(two):
    import peft

    adapter = two.tmp / "adapter-exact"
    refused = run("to-lora", two.base, adapter, two.out, "--rank", "1", "--quiet")
    assert refused.status == 1
    assert "rank" in refused.err
    assert not two.out.exists()
    done = run("to-lora", two.base, adapter, two.out, "--rank", "96", "--json")
    assert done.status == 0, done.err
    assert run("fold", two.base, adapter, two.tmp / "folded", "--quiet").status == 0
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        ours = open_model(two.tmp / "folded")(ids).logits
        theirs = peft.PeftModel.from_pretrained(open_model(two.base), two.out).eval()(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5 * float(ours.abs().max()))


def test_another_convention_and_back(files):
    lycoris, again = files.tmp / "a.safetensors", files.tmp / "again"
    done = run("convert", files.base, files.adapter, lycoris, "--to", "oft_v2")
    assert done.status == 0, done.err
    assert "made of oftfx" in done.out
    assert run("convert", files.base, lycoris, again).status == 0
    done = run("fold", files.base, lycoris, files.out, "--quiet", "--json")
    assert done.status == 0, done.err
    assert "in memory" not in done.err
    assert len(json.loads(done.out)["sites"]) == 14
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        first, second = (oftfx.load_adapter(open_model(files.base), a)(ids).logits for a in (files.adapter, again))
    assert torch.allclose(first, second, atol=1e-5)
    taken = run("convert", files.base, files.adapter, again)
    assert "is there already" in taken.err
    assert run("convert", files.base, files.adapter, files.tmp / "x", "--to", "nothing").status == 1


def test_a_trainer_checkpoint_becomes_an_adapter(files):
    model = randomize(oftfx.transform(open_model(files.base), {"all-linear": OFT(16)}))
    checkpoint = files.tmp / "checkpoint-10"
    checkpoint.mkdir()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, checkpoint / "model.safetensors")
    rules = files.tmp / "rules.toml"
    rules.write_text('[[rule]]\ntarget = "all-linear"\nblock_size = 16\n')
    done = run("convert", files.base, checkpoint, files.out, "--rules", rules)
    assert done.status == 0, done.err
    skew = load_file(files.out / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(skew[f"base_model.model.{name}.oft_R.weight"], model.get_submodule(name).oft.default.skew)
