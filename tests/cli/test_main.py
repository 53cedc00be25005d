import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.needs("typer", "rich", "transformers")


def oftfx(*arguments):
    return subprocess.run([sys.executable, "-m", "oftfx.cli", *arguments], capture_output=True, text=True, check=False)


def test_help_names_the_commands():
    done = oftfx("--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("demo", "ocr", "plan", "repository", "version"))
    assert "--quick" in oftfx("demo", "--help").stdout


def test_plan_from_a_config_alone(tiny_llama, tmp_path):
    model = tiny_llama()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    done = oftfx("plan", str(tmp_path), "--block-size", "16")
    assert done.returncode == 0, done.stderr
    assert "14 sites, 14 rotations" in done.stdout
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\ntarget = "*.q_proj"\nblock_size = 8\n')
    done = oftfx("plan", str(tmp_path), "--rules", str(rules), "--json")
    assert [e["block_size"] for e in json.loads(done.stdout)["entries"]] == [8, 8]


def test_errors_are_one_line_and_a_status(tmp_path):
    done = oftfx("plan", str(tmp_path))
    assert done.returncode == 1
    assert "has no config.json" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
