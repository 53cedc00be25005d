"""Tables whatever the width: no word is broken, and nothing is left out."""

import pytest

from oftfx.terminal import remark_bar, render

pytestmark = pytest.mark.needs("rich")
COLUMNS = ("site", "in", "error %", "note")
NOTE = "not into a producer: it is read twice"
ROWS = [(f"model.layers.{i}.self_attn.q_proj", "4096", f"{i / 7:.4f}", NOTE) for i in (0, 31)]


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_every_word_is_whole_at_every_width(width):
    text = render("Fold", COLUMNS, ROWS, width=width)
    lines = text.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    for row in ROWS:
        assert all(cell in text for cell in row[:3])
    assert text.count("producer:") == 2
    assert all(word in lines_words(lines) for word in ["not", "into", "a", "producer:", "it", "is", "read", "twice"])


def lines_words(lines):
    return {word.strip(",") for line in lines for word in line.split()}


def test_brackets_are_no_markup():
    assert "pip install 'oftfx[hqq]'" in render("t", ("a", "b"), [("x", "pip install 'oftfx[hqq]'")], width=120)


def test_a_bar_where_nobody_looks_is_a_line_each_tenth(capsys):
    with remark_bar("train", 50) as advance:
        for step in range(1, 51):
            advance(step, f"loss {step}")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 10
    assert lines[-1].strip() == "train: 50/50 loss 50"
