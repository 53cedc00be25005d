"""A part of tools/compare/compare_peft_tests.py: the committed figures are what it finds, and the pages say them."""

import importlib
import json
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.needs("peft", "transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
pytest.importorskip("peft")
ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "tools/results/peft_tests.json").read_text())


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("tools.compare.compare_peft_tests")
    sys.path.remove(str(ROOT))


PART = ("Vanilla MLP 5 OFT", "Vanilla MLP 13 OFT", "Embedding + transformers Conv1D 1 OFT", "Conv2d 4 OFT", "gpt2 0")


def test_a_part_of_the_table_is_what_is_committed(tool):
    rows = [r for r in tool.ROWS if r.name in PART]
    assert len(rows) == len(PART)
    found = tool.run(rows, tool.CHECKS)
    assert tool.failures(found) == [f for f in RESULTS["not"] if f["row"] in PART]


def test_a_classifiers_checks(tool):
    rows = [r for r in tool.ROWS if r.name == "bert classifier 0"]
    found = tool.run(rows, tool.CHECKS)
    assert not [f for f in tool.failures(found) if "oftfx" in f]


def test_the_figures_add_up_and_the_guide_says_them(tool):
    cells = [cell["oftfx"].split() for cell in RESULTS["checks"].values()]
    asked = sum(int(of) for _, _, of, *_ in cells)
    assert len(tool.ROWS) * (len(tool.CHECKS) - 2) <= asked < len(tool.ROWS) * len(tool.CHECKS)  # two ask texts alone
    for side, counts in RESULTS["counts"].items():
        assert counts == {"hold": asked - sum(side in f for f in RESULTS["not"]), "of": asked}
    assert RESULTS["checks"].keys() == tool.CHECKS.keys()
    guide = (ROOT / "tools/docs/pages/guides/from-peft.md").read_text()
    ours, theirs = RESULTS["counts"]["oftfx"], RESULTS["counts"]["PEFT"]["hold"]
    assert f"{ours['hold']} of {ours['of']} checks hold here, {theirs} in PEFT" in guide


def test_tables_of_a_checkout_are_read_and_not_run(tool, tmp_path):
    tables = importlib.import_module("tools.compare.peft_tables")
    (tmp_path / "tests").mkdir()
    for path in (tables.CUSTOM, *tables.FAMILIES):
        (tmp_path / path).write_text("raise SystemExit\n")
    text = 'CASES = [("one", "MLP", OFTConfig, {"r": 2}), ("two", "MLP", LoraConfig, {}), ("three", OFTConfig)]'
    (tmp_path / tables.CUSTOM).write_text(f"raise SystemExit\n{text}")
    (tmp_path / "tests/test_encoder_decoder_models.py").write_text('ALL = [(OFTConfig, {"task_type": "SEQ_2_SEQ_LM"})]')
    found = tool.read(tmp_path)
    assert [(r.name, r.model, r.config) for r in found] == [
        ("one", "MLP", {"r": 2}),
        ("t5 0", "t5", {"task_type": "SEQ_2_SEQ_LM"}),
        ("bart 0", "bart", {"task_type": "SEQ_2_SEQ_LM"}),
    ]
