"""Model cards of folds."""

import json

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterFileError
from tests.reference import randomize


@pytest.fixture
def folder(tmp_path):
    model = randomize(oftfx.transform(nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 4)), {"0": OFT(4), "1": OFT(5)}))
    return oftfx.fold(model, calibration=[(torch.randn(3, 12),)]).save(tmp_path / "my_model")


def matter(card):
    """The front matter, by a reader of YAML, and the rest."""
    import yaml

    start, text, rest = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(text), rest


@pytest.mark.needs("yaml")
def test_front_matter_is_what_was_given_and_nothing_else(folder):
    assert matter(oftfx.model_card(folder))[0] == {"tags": ["oft", "oftfx"]}
    given = {"base_model": 'org/Base-1.5: a "b"', "license": "no", "language": ["no", "en"], "datasets": ["a/b", "1"]}
    found, rest = matter(oftfx.model_card(folder, **given, tags=["x", "oft"], title="A *card*"))
    assert found == {**given, "tags": ["oft", "oftfx", "x"]}
    assert rest.strip().startswith("# A \\*card\\*")


@pytest.mark.needs("huggingface_hub")
def test_the_hub_reads_it(folder):
    from huggingface_hub import ModelCard

    card = ModelCard(oftfx.model_card(folder, base_model="org/base", license="apache-2.0", language=["en"]))
    assert (card.data.base_model, card.data.license, card.data.language) == ("org/base", "apache-2.0", ["en"])


def test_its_figures_are_those_of_the_fold(folder):
    report = oftfx.FoldReport.from_json((folder / "oftfx_fold.json").read_text())
    card = oftfx.model_card(folder)
    assert report.verdict.sentence.partition(": ")[2].rstrip(".") in card
    assert report.provenance.hashes["default"] in card
    assert f"torch {torch.__version__}".replace("+", "+") in card
    assert "| Perplexity | not measured |" in card
    assert "1 input" in card


def test_what_a_loader_would_drop_is_said(folder):
    assert "Rotations stay" not in oftfx.model_card(folder)
    (folder / "oftfx_rotations.safetensors").write_bytes(b"")
    card = oftfx.model_card(folder)
    assert "Other loaders drop them" in card
    assert "oftfx.load_folded" in card


@pytest.mark.needs("transformers")
def test_an_ordinary_checkpoint_names_its_class(tiny_llama, tmp_path):
    model = randomize(oftfx.transform(tiny_llama(num_hidden_layers=1), {"*.q_proj": OFT(16)}))
    card = oftfx.model_card(oftfx.fold(model, inplace=True).save(tmp_path / "m"))
    assert 'LlamaForCausalLM.from_pretrained("path/to/this/directory")' in card
    assert "no calibration" in card or "not measured" in card


def test_a_never_trained_adapter(tmp_path):
    model = oftfx.transform(nn.Sequential(nn.Linear(12, 5)), {"0": OFT(4)})
    card = oftfx.model_card(oftfx.fold(model).save(tmp_path / "m"))
    assert "**Nothing to fold.**" in card
    assert "100" not in card.replace(oftfx.__version__, "").partition("Provenance")[0]


@pytest.mark.parametrize("text", [None, "[]", "{}", "nonsense", '{"report": {"sites": 3}}', '{"report": []}'])
def test_directories_without_a_good_note(tmp_path, text):
    if text is not None:
        (tmp_path / "oftfx_fold.json").write_text(text)
    with pytest.raises(AdapterFileError, match="oftfx_fold.json"):
        oftfx.model_card(tmp_path)


def test_a_note_of_a_name_that_is_no_name(folder):
    """What stands in a note is text of others: it becomes no code."""
    note = json.loads((folder / "oftfx_fold.json").read_text())
    note |= {"way": "transformers", "facts": {"class": "x\nimport os"}}
    note["report"]["adapters"] = ["<b>|*"]
    (folder / "oftfx_fold.json").write_text(json.dumps(note))
    card = oftfx.model_card(folder)
    assert "import os" not in card
    assert "\\<b\\>\\|\\*" in card
