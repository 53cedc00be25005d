import json
from importlib import metadata

import pytest

from tests.cli.command import run

pytestmark = pytest.mark.needs("typer", "rich", "transformers", "tokenizers")


def test_a_base_an_adapter_and_a_fold(files):
    base = json.loads(run("inspect", files.base, "--json").out)
    assert (base["kind"], base["model"], base["hidden_size"]) == ("checkpoint", "LlamaForCausalLM", 64)
    adapter = json.loads(run("inspect", files.adapter, "--json").out)
    assert (adapter["kind"], adapter["convention"], adapter["rotations"]) == ("adapter", "oftfx", 14)
    assert {(r["blocks"], r["block size"]) for r in adapter["rows"]} == {("4", "16"), ("6", "16")}
    assert run("fold", files.base, files.adapter, files.out, "--quiet", "--name", "mine").status == 0
    fold = json.loads(run("inspect", files.out, "--json").out)
    assert (fold["kind"], fold["actions"]) == ("fold", {"folded": 14})
    assert any("mine" in f for f in fold["folds"])


def test_what_is_wrong_has_a_status(files):
    plan = files.adapter / "oftfx_plan.json"
    edited = plan.read_text().replace('"block_size": 16', '"block_size": 8', 1)
    assert edited != plan.read_text()
    plan.write_text(edited)
    done = run("inspect", files.adapter)
    assert (done.status, "two saves" in done.out) == (3, True)
    (files.tmp / "bad.safetensors").write_bytes(b"\xff" * 4096)
    done = run("inspect", files.tmp / "bad.safetensors")
    assert (done.status, "damaged or not a safetensors file" in done.err) == (1, True)
    (files.tmp / "model.bin").write_bytes(b"\x80\x04")
    assert "is a pickle" in run("inspect", files.tmp / "model.bin").err
    assert "there is no" in run("inspect", files.tmp / "nothing").err
    (files.tmp / "empty").mkdir()
    assert "holds nothing that is known" in run("inspect", files.tmp / "empty").err


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,9999999]}}',
        b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","data_offsets":[0,16]}}',
        b"[1,2]",
        b"{",
    ],
)
def test_headers_are_not_believed(files, header):
    file = files.tmp / "odd.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    done = run("inspect", file)
    assert (done.status, "damaged or not a safetensors file" in done.err) == (1, True)


def test_a_plan_and_a_report(files):
    (files.tmp / "plan.json").write_text(run("plan", files.base, "--block-size", "16", "--json").out)
    found = json.loads(run("inspect", files.tmp / "plan.json", "--json").out)
    assert (found["kind"], found["sites"]) == ("plan", 14)
    report = run("fold", files.base, files.adapter, files.out, "--json").out
    (files.tmp / "report.json").write_text(report)
    found = json.loads(run("inspect", files.tmp / "report.json", "--json").out)
    assert (found["kind"], found["actions"]) == ("fold report", {"folded": 14})


def test_the_installation(monkeypatch):
    from oftfx.formats.registry import formats
    from oftfx.inspecting.installation import look
    from oftfx.inspecting.packages import tested

    done = run("doctor", "--json")
    found = json.loads(done.out)
    states = {f["name"]: f["state"] for f in found["formats"]}
    assert states["dense"] == "works"
    assert set(states) == set(formats())
    assert (done.status == 0) == ("fails" not in states.values())
    torch = next(p for p in found["packages"] if p["name"] == "torch")
    assert torch["here"] == metadata.version("torch")
    assert (torch["allowed"], torch["oldest"]) == ("2.7", tested()["torch"]["oldest"])

    monkeypatch.setattr("oftfx.inspecting.packages.tested", lambda: {"torch": {"oldest": "1.0", "newest": "1.9"}})
    remarked = look()
    torch = next(p for p in remarked.packages if p.name == "torch")
    assert (torch.oldest, torch.newest, torch.remark) == ("1.0", "1.9", "newer than tested")
    assert "newer than tested" in str(remarked)
    assert remarked.is_sound == (done.status == 0)

    def broken(*_, **__):
        raise RuntimeError("a kernel that is not there")

    monkeypatch.setattr(type(formats()["dense"]), "make_tiny", broken)
    assert not look().is_sound
    failing = next(f for f in look().formats if f.name == "dense")
    assert "a kernel that is not there" in failing.remark
