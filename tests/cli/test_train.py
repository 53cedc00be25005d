"""Training from the command line: what is learnt, how it goes on after a stop, and what it leaves."""

import json
import signal
import time
import tomllib

import pytest
import torch

import oftfx
from oftfx.opened import open_model, open_tokenizer
from oftfx.training.read_examples import read_examples
from tests.cli.command import run, start
from tests.streaming.compare import files as bytes_of

pytestmark = pytest.mark.needs("typer", "rich", "transformers", "tokenizers", "tomli_w")


def options(files, **more):
    said = {"base": files.base, "data": files.texts, "sequence": 32, "block-size": 16, "rate": 0.02, **more}
    return [word for name, value in said.items() for word in (f"--{name}", str(value))]


def loss_of(model, files):
    """Of the rows that a run holds out."""
    rows = read_examples(files.texts, open_tokenizer(files.base), 32)
    held = rows.split(min(16, len(rows) // 5))[1]
    with torch.no_grad():
        return float(model(**next(held.batches(len(held))), use_cache=False).loss)


def test_a_run_and_what_it_leaves(files):
    done = run("train", files.out, *options(files, steps=12, every=5), "--json")
    assert done.status == 0, done.err
    result = json.loads(done.out)
    assert len(result["losses"]) == 12
    assert result["held_out"]["after"]["loss"] < result["held_out"]["before"]["loss"] - 0.05
    recipe = tomllib.loads((files.out / "oftfx_train.toml").read_text())
    assert (recipe["rate"], recipe["steps"], recipe["target"]) == (0.02, 12, "all-linear")
    # The adapter is what the figure was measured with.
    model = oftfx.load_adapter(open_model(files.base), files.out / "adapter")
    assert loss_of(model, files) == pytest.approx(result["held_out"]["after"]["loss"], rel=1e-4)
    again = run("train", files.out)
    assert again.status == 0
    assert "is complete; nothing to do" in again.err


def test_a_dry_run_writes_nothing(files):
    done = run("train", files.out, *options(files), "--dry-run")
    assert "14 sites" in done.out
    assert not files.out.exists()


def test_a_stopped_run_ends_where_an_undisturbed_one_does(files, monkeypatch):
    from oftfx.training import job

    assert run("train", files.tmp / "whole", *options(files, steps=9, every=4, dropout=0.2)).status == 0
    real, calls = job.minimise, []

    def stopped(loss, *rest, report, **more):
        def stop(done, value):
            report(done, value)
            if done == 6:
                raise KeyboardInterrupt

        calls.append(0)
        return real(loss, *rest, report=stop if len(calls) == 1 else report, **more)

    monkeypatch.setattr(job, "minimise", stopped)
    done = run("train", files.out, *options(files, steps=9, every=4, dropout=0.2))
    assert done.status == 130
    assert "the same command goes on with it" in done.err
    assert "stopped after step 6" in run("inspect", files.out).out
    assert not (files.out / "adapter").exists()
    done = run("train", files.out)
    assert done.status == 0, done.err
    assert bytes_of(files.out / "adapter") == bytes_of(files.tmp / "whole" / "adapter")


def test_another_recipe_is_refused(files):
    run("train", files.out, *options(files, steps=2))
    done = run("train", files.out, *options(files, steps=2, seed=4))
    assert done.status == 1
    assert "has a run with another recipe (seed: 4, there 0)" in done.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rate": -1.0}, "expected a rate"),
        ({"data": "nowhere.jsonl"}, "cannot be read as text"),
        ({"target": "no_such_layer"}, "no_such_layer"),
        ({"dtype": "int3"}, "expected 'auto', 'float32'"),
        ({"sequence": 100000}, "less than one row of 100000 tokens"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(files, more, message):
    done = run("train", files.out, *options(files, steps=2, **more))
    assert done.status == 1
    assert message in done.err
    assert not files.out.exists()


def test_a_recipe_file_and_its_faults(files):
    recipe = files.tmp / "recipe.toml"
    recipe.write_text(f'base = "{files.base}"\ndata = "{files.texts}"\nsequence = 32\nblock_size = 16\nsteps = 2\n')
    assert run("train", files.out, "--recipe", recipe, "--rate", "0.01").status == 0
    assert tomllib.loads((files.out / "oftfx_train.toml").read_text())["rate"] == 0.01
    recipe.write_text('base = "x"\ndata = "y"\nlerning_rate = 3\n')
    assert "'lerning_rate' is no field of a recipe" in run("train", files.tmp / "b", "--recipe", recipe).err
    recipe.write_text('base = "x"\ndata = "y"\nsteps = "three"\n')
    assert "steps = 'three'; expected a int" in run("train", files.tmp / "b", "--recipe", recipe).err


@pytest.mark.needs("bitsandbytes", "accelerate")
@pytest.mark.slow
def test_trained_through_the_fold_and_folded(files):
    """The fold writes the codes and scales that the last held-out figure was measured with."""
    assert run("quantize", files.base, files.tmp / "nf4", "--to", "nf4").status == 0
    files.base = files.tmp / "nf4"
    done = run("train", files.out, *options(files, steps=10), "--fold-aware", "4", "--json")
    assert done.status == 0, done.err
    result = json.loads(done.out)
    folded = run("fold", files.base, files.out / "adapter", files.tmp / "folded", "--json")
    assert folded.status == 0, folded.err
    assert "14 layers have codes and scales that were trained" in folded.err
    assert {s["action"] for s in json.loads(folded.out)["sites"]} == {"as trained"}
    assert loss_of(open_model(files.tmp / "folded"), files) == pytest.approx(
        result["held_out"]["after, folded"]["loss"], rel=1e-4
    )


@pytest.mark.slow
def test_a_process_that_is_interrupted(files):
    process = start("train", files.out, *options(files, steps=3000, every=2))
    while not (files.out / "training.safetensors").exists():
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate()
    assert process.returncode == 130, (out, errors)
    assert "Traceback" not in out + errors
    assert "stopped after step" in run("inspect", files.out).out
