"""What a run has written of itself, damaged: done again, or refused; never believed."""

import json

import pytest

from oftfx.errors import FoldError
from oftfx.folding.record import SiteFold
from oftfx.streaming.journal import Done, Journal
from oftfx.streaming.staging import Staging

LINE = SiteFold("a.b", "dense", "folded", energy=2.5, output_error=None, tokens=3)


@pytest.fixture
def journal(tmp_path):
    made = Journal.begin(tmp_path / "journal.jsonl", "key")
    made.add(0, Done({"w": "12"}, (LINE,), {"t": b"\0\1"}))
    made.add(7, Done({"v": "34"}))
    made.flush()
    return made


def test_there_and_back(journal):
    assert Journal.read(journal.path, "key").done == journal.done
    assert Journal.read(journal.path, "another") is None


@pytest.mark.parametrize(
    "bad",
    [
        {"unit": "0"},
        {"digests": ["w"]},
        {"lines": [{"fqn": "a.b"}]},
        {"lines": [{"fqn": "a.b", "format": "dense", "action": "folded", "more": 1}]},
        {"tails": {"t": "*"}},
        {"tails": 5},
        {"more": 1},
    ],
    ids=str,
)
def test_a_line_of_another_kind_ends_what_is_believed(journal, bad):
    head, first, second, _ = journal.path.read_bytes().split(b"\n")
    wrong = json.dumps(json.loads(second) | bad).encode()
    journal.path.write_bytes(b"\n".join([head, first, wrong, second, b""]))
    assert Journal.read(journal.path, "key").done == {0: journal.done[0]}
    journal.path.write_bytes(b"\n".join([head, first, b"[" * 100_000, b""]))
    assert [*Journal.read(journal.path, "key").done] == [0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Expecting property name"),
        ("[]", r"is \[\], expected an object"),
        ('{"key": "k", "names": ["a"]}', "has no 'stale'"),
        ('{"key": "k", "names": "a", "stale": []}', "names is 'a', expected a list"),
        ('{"key": "k", "names": ["../a"], "stale": []}', "'../a' is no name of a file"),
        ('{"key": "k", "names": [], "stale": ["/etc/passwd"]}', "'/etc/passwd' is no name of a file"),
    ],
)
def test_a_landing_that_is_damaged_is_refused(tmp_path, text, said):
    staging = Staging(tmp_path)
    with staging.alone():
        (staging.root / "landing.json").write_text(text)
        with pytest.raises(FoldError, match=f"landing.json is damaged: .*{said}.*; remove .* to begin anew"):
            staging.landing("k")
