import json

import pytest

from tests.cli.command import run

pytestmark = pytest.mark.needs("typer", "rich", "transformers", "tokenizers", "itables", "vl_convert")


def test_pages_of_one_fold_and_of_several(files):
    page = files.tmp / "fold.html"
    done = run("fold", files.base, files.adapter, files.out, "--quiet", "--html", page)
    assert done.status == 0, done.err
    assert "<!doctype html>" in page.read_text().lower()
    assert run("report", files.out, "-o", files.tmp / "r.md").status == 0
    assert "The adapter arrived" in (files.tmp / "r.md").read_text()
    assert run("report", files.out, "-o", files.tmp / "figures").status == 0
    assert list((files.tmp / "figures").glob("*.svg"))
    both = run("report", f"one={files.out}", f"two={files.out}", "-o", files.tmp / "both.html")
    assert both.status == 0, both.err
    assert "two" in (files.tmp / "both.html").read_text()
    assert "there is no" in run("report", files.tmp / "nowhere", "-o", files.tmp / "x.html").err
    plan = files.tmp / "plan.html"
    assert run("plan", files.base, "--block-size", "16", "--html", plan).status == 0
    assert "q_proj" in plan.read_text()
    again = run("plan", files.base, "--block-size", "16", "--html", plan)
    assert (again.status, "is there already" in again.err) == (1, True)
    assert run("fold", files.base, files.adapter, files.tmp / "new", "--html", plan).status == 1
    assert not (files.tmp / "new").exists()


def test_a_model_card_has_the_figures_of_the_fold(files):
    report = json.loads(run("fold", files.base, files.adapter, files.out, "--json").out)
    done = run("card", files.out, "--license", "apache-2.0", "--base-model", "someone/base")
    assert done.status == 0, done.err
    head, text = done.out.split("---")[1:3]
    assert "license: apache-2.0" in head
    assert "someone/base" in head
    assert report["verdict"]["state"] == "green"
    assert f"{report['verdict']['share']:.1%} of its update is in the weights" in text
    assert run("card", files.out, "--write").status == 0
    assert (files.out / "README.md").is_file()
    assert "is there already" in run("card", files.out, "--write").err
