"""Which tokens of a file are learnt, against what each line says by itself."""

import json

import pytest

from oftfx.training.examples import IGNORED
from oftfx.training.read_examples import DataError, read_examples
from tests.cli.conftest import make_tokenizer

pytestmark = pytest.mark.needs("transformers", "tokenizers")
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path):
    return make_tokenizer(tmp_path / "tokenizer", TEMPLATE)


def file_of(tmp_path, *lines, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def learnt(row, tokenizer):
    """The words of a row that are learnt."""
    return tokenizer.decode([i for i, label in zip(row.ids, row.labels, strict=True) if label != IGNORED]).split()


def test_only_what_an_assistant_says_is_learnt(tokenizer, tmp_path):
    talk = [
        {"role": "system", "content": "w1 w2"},
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4 w5"},
        {"role": "user", "content": "w6 w7"},
        {"role": "assistant", "content": "w8"},
    ]
    made = read_examples(file_of(tmp_path, {"messages": talk}), tokenizer, 64)
    (row,) = made.rows
    assert learnt(row, tokenizer) == ["w4", "w5", "</s>", "w8", "</s>"]
    assert all(label in (IGNORED, i) for i, label in zip(row.ids.tolist(), row.labels.tolist(), strict=True))
    assert made.tokens == 5
    assert made.remarks == ()


def test_only_the_completion_of_a_prompt_is_learnt(tokenizer, tmp_path):
    lines = [{"prompt": "w1 w2 w3", "completion": "w4"}, {"prompt": "w9", "completion": "w10 w11"}]
    first, second = read_examples(file_of(tmp_path, *lines), tokenizer, 64).rows
    assert learnt(first, tokenizer) == ["w4", "</s>"]
    assert learnt(second, tokenizer) == ["w10", "w11", "</s>"]


def test_all_of_plain_text_is_learnt_in_rows_of_one_length(tokenizer, tmp_path):
    lines = [{"text": " ".join(f"w{i + k}" for k in range(5))} for i in range(4)]
    made = read_examples(file_of(tmp_path, *lines), tokenizer, 7)
    assert [len(r.ids) for r in made.rows] == [7, 7, 7]  # 24 tokens with the ends of texts
    assert all((r.ids == r.labels).all() for r in made.rows)
    plain = tmp_path / "data.txt"
    plain.write_text("\n\n".join(line["text"] for line in lines))
    assert all((a.ids == b.ids).all() for a, b in zip(made.rows, read_examples(plain, tokenizer, 7).rows, strict=True))


def test_what_is_cut_or_left_out_is_said(tokenizer, tmp_path):
    lines = [
        {"prompt": "w1", "completion": " ".join(["w2"] * 20)},
        {"prompt": " ".join(["w1"] * 20), "completion": "w2"},
        {"prompt": "w1", "completion": "w2"},
    ]
    made = read_examples(file_of(tmp_path, *lines), tokenizer, 8)
    assert [len(r.ids) for r in made.rows] == [8, 3]
    assert made.remarks == (
        "2 of 3 rows cut to 8 tokens",
        "1 of 3 rows left out, for nothing in them is learnt",
    )


def test_a_batch_is_padded_on_the_right_and_padding_is_not_learnt(tokenizer, tmp_path):
    lines = [{"prompt": "w1", "completion": " ".join(["w2"] * n)} for n in (1, 4, 2)]
    made = read_examples(file_of(tmp_path, *lines), tokenizer, 64)
    batch = made.together(range(3))
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6, [1, 1, 1, 1, 0, 0]]
    assert batch["labels"][0].tolist() == [IGNORED, 5, 2, IGNORED, IGNORED, IGNORED]
    seen = [made.batch(call, 1)["input_ids"].shape[1] for call in range(3)]
    assert sorted(seen) == [3, 4, 6]  # no row twice in an epoch


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"text": "w1"}, {"prompt": "w1", "completion": "w2"}], "of several kinds, prompts and text"),
        ([{"prompt": "w1"}], 'line 1: expected an object with "text", "messages", or "prompt" and "completion"'),
        (["w1"], "line 1: expected an object"),
        ([{"messages": [{"role": "user", "content": "w1"}]}], "there is nothing to learn"),
        ([{"messages": [{"role": "user"}]}], "line 1"),
        ([{"messages": "w1"}], "line 1"),
    ],
)
def test_what_cannot_be_learnt_is_named_by_its_line(tokenizer, tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        read_examples(file_of(tmp_path, *lines), tokenizer, 16)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    template = "w{{ messages | length }} {% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    tokenizer = make_tokenizer(tmp_path / "tokenizer", template)
    talk = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
    with pytest.raises(DataError, match="does not put turn 2 behind what it makes of the turns before"):
        read_examples(file_of(tmp_path, {"messages": talk}), tokenizer, 16)
