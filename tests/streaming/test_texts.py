import json

import pytest
import torch

from oftfx.errors import FoldError, OftfxWarning
from oftfx.streaming.texts import blocks, calibration_from, read_texts
from tests.cli.test_fold import make_tokenizer


class Letters:
    """A token a letter."""

    eos_token_id = 0

    def __call__(self, text):
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def test_lines_of_json(tmp_path):
    file = tmp_path / "texts.jsonl"
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file.write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps(chat) + "\n")
    assert read_texts(file, Letters()) == ["one", "<user>a<assistant>b"]


def test_plain_text(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_bytes("one\r\nline\r\n\r\n\r\ntwo é\n".encode())
    assert read_texts(file, Letters()) == ["one\nline", "two é"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", "{", "line 1: not JSON"),
        ("a.jsonl", '{"text": "x"}\n{"words": "x"}', 'line 2: expected an object with "text" or "messages"'),
        ("a.jsonl", '{"messages": [{"content": "x"}]}', "chat template does not take these messages"),
        ("a.txt", " \n\n \n", "there is no text in it"),
        ("missing.txt", None, "cannot be read as text"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read as text"),
    ],
)
def test_what_is_no_text_is_said(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FoldError, match=words):
        read_texts(tmp_path / name, Letters())


def test_blocks_are_cut_from_the_row_of_all_texts():
    found = blocks(Letters(), ["ab", "cde"], 3)
    assert found.tolist() == [[97, 98, 0], [99, 100, 101]]


@pytest.mark.needs("transformers", "tokenizers")
def test_so_many_tokens_as_are_asked_for(tmp_path):
    make_tokenizer(tmp_path)
    file = tmp_path / "texts.txt"
    file.write_text(" ".join(f"w{i % 29}" for i in range(70)))
    found = calibration_from(tmp_path, file, 64, 8)
    assert [b["input_ids"].shape for b in found] == [(4, 8), (4, 8)]
    assert torch.cat([b["input_ids"] for b in found]).flatten().tolist() == [i % 29 + 3 for i in range(64)]
    with pytest.warns(OftfxWarning, match="it has 64 tokens in sequences of 32, of the 8,192 asked for"):
        assert len(calibration_from(tmp_path, file, 8192, 32)) == 1
    with pytest.raises(FoldError, match="less than one sequence of 512 tokens"):
        calibration_from(tmp_path, file, 8192, 512)
    with pytest.raises(FoldError, match="one sequence at least"):
        calibration_from(tmp_path, file, 100, 512)
    (tmp_path / "bare").mkdir()
    with pytest.raises(FoldError, match="no tokenizer can be loaded"):
        calibration_from(tmp_path / "bare", file, 64, 8)
