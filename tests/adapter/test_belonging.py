"""Weights and configuration of an adapter: of one save, or refused."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterFileError
from tests.reference import dense_rotation, randomize
from tests.test_files import Steps

WEIGHTS, CONFIG, PLAN = "adapter_model.safetensors", "adapter_config.json", "oftfx_plan.json"
X = torch.linspace(-1, 1, 72).reshape(3, 24)


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 10), nn.Linear(10, 6))


def series():
    return randomize(oftfx.transform(base(), {"0": OFT(8)}), std=0.3)


def exact():
    """Read by the other one's configuration, these numbers are another rotation."""
    return randomize(oftfx.transform(base(), {"0": OFT(8, parameterization="cayley")}), std=0.3, seed=5)


def save(folder, convention):
    oftfx.save_adapter(exact(), folder, convention=convention)


def loaded(folder):
    return oftfx.load_adapter(base(), folder)(X)


LAYOUTS = [("peft", "peft"), ("peft", "oftfx"), ("oftfx", "peft"), ("oftfx", "oftfx")]


@pytest.fixture(params=LAYOUTS, ids=str)
def saved(request, tmp_path):
    """A directory with an adapter, and the convention of the one that comes over it."""
    folder = tmp_path / "adapter"
    oftfx.save_adapter(series(), folder, convention=request.param[0])
    (folder / "README.md").write_text("a user's")
    return folder, request.param[1]


def test_the_two_adapters_differ_and_a_mixture_would_be_taken_without_a_digest(tmp_path):
    oftfx.save_adapter(series(), tmp_path / "a")
    oftfx.save_adapter(exact(), tmp_path / "b")
    skew = load_file(tmp_path / "b" / WEIGHTS)["base_model.model.0.oft_R.weight"]
    right = X @ dense_rotation(skew, 8, 3, parameterization="cayley").float() @ base()[0].weight.T
    assert not torch.equal(loaded(tmp_path / "a"), loaded(tmp_path / "b"))
    shutil.copy(tmp_path / "a" / CONFIG, tmp_path / "b" / CONFIG)
    with pytest.raises(AdapterFileError, match=f"{CONFIG} is not the one that {WEIGHTS} was written with"):
        loaded(tmp_path / "b")
    save_file(load((tmp_path / "b" / WEIGHTS).read_bytes()), tmp_path / "b" / WEIGHTS)  # as PEFT writes it
    mixed = oftfx.load_adapter(base(), tmp_path / "b")[0](X) - base()[0].bias
    assert (mixed - right).abs().max() > 1e-3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_an_error_at_every_step_leaves_the_adapter_that_was_there(saved, monkeypatch, code):
    folder, convention = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def stop():
        raise OSError(code, os.strerror(code), str(folder))

    steps = Steps(monkeypatch, stop)
    shutil.copytree(folder, folder.with_name("other"))
    save(folder.with_name("other"), convention)
    total = steps.count
    assert total > 15
    for steps.at in range(total):
        steps.count = 0
        with pytest.raises(AdapterFileError, match=f"{folder}: cannot be written to: {os.strerror(code)}"):
            save(folder, convention)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    steps.count = 0
    steps.at = None
    save(folder, convention)
    assert torch.equal(loaded(folder), exact()(X))


KILLED = """
import os, sys
from pathlib import Path
import pytest
from tests.adapter.test_belonging import exact, save
from tests.test_files import Steps
exact()
steps = Steps(pytest.MonkeyPatch(), lambda: os._exit(9))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    if os.fork() == 0:
        steps.at = int(folder.name)
        save(folder, sys.argv[2])
        os._exit(0)
    os.wait()
"""


@pytest.mark.filterwarnings("ignore:.*a save was killed while")
def test_a_process_killed_at_every_step_leaves_one_adapter(saved, tmp_path):
    folder, convention = saved
    if convention == "oftfx":  # nor one that knows nothing of its configuration
        save_file(load((folder / WEIGHTS).read_bytes()), folder / WEIGHTS)
    for at in range(40):
        shutil.copytree(folder, tmp_path / "killed" / str(at))
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "killed", convention], check=True, timeout=300)
    old, new, seen = series()(X), exact()(X), set()
    for killed in (tmp_path / "killed").iterdir():
        begun = not (killed / CONFIG).exists() and not (killed / PLAN).exists()
        output = loaded(killed)
        assert torch.equal(output, new) or (torch.equal(output, old) and not begun), killed.name
        seen.add("ended by its reader" if begun else "old" if torch.equal(output, old) else "new")
        save(killed, convention)
        assert torch.equal(loaded(killed), new)
        assert not list(killed.glob(".*"))
        assert (killed / "README.md").exists()
    assert seen == {"old", "new", "ended by its reader"}


@pytest.mark.parametrize(
    ("field", "value"), [("oft_block_size", 4), ("num_cayley_neumann_terms", 3), ("target_modules", ["0", "1"])]
)
def test_a_configuration_that_was_edited_is_refused(tmp_path, field, value):
    oftfx.save_adapter(series(), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, field: value}))
    with pytest.raises(AdapterFileError, match="no rotation for 1|was edited"):
        loaded(tmp_path)


def test_what_means_nothing_may_be_edited(tmp_path):
    oftfx.save_adapter(series(), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config.update(base_model_name_or_path="me/model", revision="main", inference_mode=False, task_type="CAUSAL_LM")
    config["target_modules"] = config["target_modules"][::-1]
    (tmp_path / CONFIG).write_text(json.dumps(dict(reversed(config.items()))))
    assert torch.equal(loaded(tmp_path), series()(X))


@pytest.mark.needs("peft")
def test_peft_takes_weights_that_know_their_configuration(tmp_path):
    from peft import PeftModel

    model = series()
    oftfx.save_adapter(model, tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as opened:
        assert len(opened.metadata()["oftfx_config_sha256"]) == 64
    theirs = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.allclose(theirs(X), model(X), atol=1e-6)
    theirs.save_pretrained(tmp_path / "again")
    assert torch.equal(loaded(tmp_path / "again"), model(X))


@pytest.mark.parametrize(
    ("version", "advice"),
    [(2, "A newer oftfx wrote it: install that"), (0, "An older one wrote it: make it again with this")],
)
def test_a_plan_of_another_version_is_refused_with_the_version(tmp_path, version, advice):
    oftfx.save_adapter(series(), tmp_path, convention="oftfx")
    plan = json.loads((tmp_path / PLAN).read_text())
    (tmp_path / PLAN).write_text(json.dumps({**plan, "oftfx_plan": version}))
    expected = rf"{PLAN}: this plan has version {version}; this oftfx reads version 1\. {advice}"
    with pytest.raises(AdapterFileError, match=expected):
        loaded(tmp_path)
