"""What every command has: help, statuses, one message for an error, and nothing of ours on the wrong stream."""

import json

import pytest

from oftfx.cli.main import PARTS
from oftfx.version import __version__
from tests.cli.command import run, start

pytestmark = pytest.mark.needs("typer", "rich", "transformers", "tokenizers")
COMMANDS = [name for part in PARTS.values() for name in part]


def test_help_names_the_commands_and_the_statuses():
    done = run("--help")
    assert done.status == 0
    assert all(name in done.out for name in COMMANDS)
    assert "130 interrupted" in " ".join(done.out.split())
    assert run("-h").out == done.out
    assert run("--version").out.strip() == f"oftfx {__version__}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    done = run(name, "-h")
    assert done.status == 0
    assert f"oftfx {name}" in done.out
    assert len(done.out.split()) > 20


def test_wrong_arguments_have_a_status_of_their_own():
    assert run("fold", "only-one").status == 2
    assert run("plan", "x", "--no-such-option").status == 2
    assert run("nothing-of-this-name").status == 2


def test_errors_are_one_message_on_standard_error(tmp_path):
    done = run("plan", tmp_path)
    assert (done.status, done.out) == (1, "")
    assert "has no config.json (there: nothing)" in done.err
    done = run("plan", "meta-llama/Llama-3.2-1B")
    assert "hf download meta-llama/Llama-3.2-1B" in done.err
    done = run("plan", tmp_path / "nowhere")
    assert "there is no directory" in done.err


def test_an_adapter_in_the_place_of_a_model_is_told(files):
    done = run("plan", files.adapter)
    assert done.status == 1
    assert "is an adapter; expected the model that it is for" in done.err


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error(files):
    process = start("plan", files.base, "--full")
    process.stdout.close()
    with process.stderr as errors:
        assert "Traceback" not in errors.read()
    assert process.wait() == 0


def test_the_plan_of_names_rules_and_a_peft_configuration(files, tmp_path):
    plain = run("plan", files.base, "--block-size", "16")
    assert "14 sites, 14 rotations" in plain.out
    named = json.loads(run("plan", files.base, "--target", "q_proj,v_proj", "--block-size", "16", "--json").out)
    assert sorted({e["site"]["fqn"].rpartition(".")[2] for e in named["entries"]}) == ["q_proj", "v_proj"]
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\ntarget = "*.q_proj"\nblock_size = 8\n')
    found = json.loads(run("plan", files.base, "--rules", rules, "--json").out)
    assert [e["block_size"] for e in found["entries"]] == [8, 8]
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "OFT", "target_modules": ["o_proj"], "r": 4, "peft_version": "0.21.2"}))
    found = json.loads(run("plan", files.base, "--rules", config, "--json").out)
    assert [(e["site"]["fqn"], e["block_size"]) for e in found["entries"]] == [
        (f"model.layers.{i}.self_attn.o_proj", 16) for i in (0, 1)
    ]
    wrong = run("plan", files.base, "--rules", rules, "--block-size", "16")
    assert "--rules says the layers and their rotations itself" in wrong.err


@pytest.mark.needs("bitsandbytes", "accelerate")
def test_the_plan_of_a_quantized_checkpoint_knows_its_format(files):
    assert run("quantize", files.base, files.out, "--to", "nf4", "--quiet").status == 0
    found = json.loads(run("plan", files.out, "--block-size", "16", "--json").out)
    assert {e["site"]["format"] for e in found["entries"]} == {"bnb4"}
