"""One sentence out of tokens, margins and logits, for each way in which two can agree or not."""

import json

import pytest
import torch

from oftfx.evaluation.tokens import Bare, Expected, follow, follow_tokens
from oftfx.evaluation.verdicts import Verification

pytestmark = pytest.mark.needs("rich")


def expected(tokens, margin=1.0, size=6):
    """Logits in which these tokens lead by ``margin``."""
    logits = torch.zeros(len(tokens), size)
    logits[range(len(tokens)), list(tokens)] = margin
    return Expected((0, 1), tuple(tokens), (margin,) * len(tokens), logits)


def verdict(*rows, tie=1e-3):
    return Verification("it", "the base with news", tuple(rows), tuple(("say", "a", "b") for _ in rows), tie)


WANT, BASE = expected((1, 2, 3)), expected((4, 2, 5))
BARE = Bare(BASE, BASE.logits)


def test_the_same_logits_are_equal():
    found = verdict(follow(WANT, WANT.logits[None], BARE))
    assert (found.state, found.is_equal) == ("equal", True)
    assert "gives the 3 tokens of the base with news, to 1 prompts" in found.sentence


def test_the_bases_logits_are_an_adapter_that_is_missing():
    found = verdict(follow(WANT, BASE.logits[None], BARE))
    assert (found.state, found.is_equal) == ("base", False)
    assert "the adapter is not there" in found.sentence


def test_other_logits_with_the_same_tokens_are_seen():
    far = WANT.logits.clone()
    far[:, 0] -= 2.0  # the likeliest stays, the rest is another model's
    found = verdict(follow(WANT, far[None], BARE))
    assert found.rows[0].is_equal
    assert (found.state, found.is_equal) == ("different", False)
    assert "its logits are off by" in found.sentence
    near = WANT.logits + 1e-4
    assert verdict(follow(WANT, near[None], BARE)).state == "equal"


def test_another_token_is_named_with_its_place_and_margin():
    other = WANT.logits.clone()
    other[1, 5] = 3.0
    row = follow(WANT, other[None], None)
    assert (row.same, row.margin, row.tokens) == (1, 1.0, (1, 5, 3))
    found = verdict(row)
    assert (
        found.sentence
        == "different: to 'say', token 2 is 'b', where the base with news says 'a' by a margin of 1.00e+00"
    )


def test_a_tie_is_what_rounding_may_decide():
    close = expected((1, 2, 3), margin=1e-4)
    other = close.logits.clone()
    other[2, 0] = 2e-4
    found = verdict(follow(close, other[None], None))
    assert (found.state, found.is_equal) == ("near ties", True)
    assert verdict(follow(close, other[None], None), tie=1e-5).state == "different"


def test_tokens_alone_cannot_show_an_adapter_that_says_what_the_base_says():
    alike = Bare(WANT, WANT.logits + torch.randn(3, 6) * 0.1)
    found = verdict(follow_tokens(WANT, (1, 2, 3), alike))
    assert (found.state, found.is_equal) == ("untold", False)
    assert "so does the base without the adapter" in found.sentence
    told = verdict(follow_tokens(WANT, (1, 2, 3), BARE))
    assert told.state == "equal"
    assert verdict(follow_tokens(WANT, (4, 2, 5), BARE)).state == "base"
    assert verdict(follow_tokens(WANT, (1, 2), BARE)).state == "different"


def test_all_of_it_is_json_and_a_table():
    found = verdict(follow(WANT, BASE.logits[None], BARE), follow(WANT, WANT.logits[None], BARE))
    read = json.loads(found.to_json())
    assert [p["same"] for p in read["prompts"]] == [0, 3]
    assert read["state"] == found.state
    assert found.sentence in found.table()
