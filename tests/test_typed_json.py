"""JSON of others as our types: what fits is the same value, and what does not is named."""

import json
from collections.abc import Mapping
from typing import Literal

import pytest

import oftfx
from oftfx import OFT
from oftfx.errors import FoldError, RuleError
from oftfx.folding.report import FoldReport
from oftfx.terminal import plain, render
from oftfx.typed_json import is_text, made, parsed
from tests.adapter.conventions.models import net


def test_values_that_fit_are_taken_over():
    assert made(tuple[int, ...], [1, 2]) == (1, 2)
    assert made(Mapping[str, float | None], {"a": 1, "b": None}) == {"a": 1, "b": None}
    assert made(Literal["rows", "columns"], "rows") == "rows"
    plan = oftfx.plan(net(), {"*": OFT(4)})
    assert oftfx.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (int, True, "x is True, expected an integer"),
        (int, 2**63, "expected an integer"),
        (float, "1", "x is '1', expected a number"),
        (str, "\ud800", "expected text"),
        (tuple[str, ...], "ab", "x is 'ab', expected a list"),
        (tuple[str, ...], ["a", None], r"x\[1\] is None, expected text"),
        (Mapping[str, int], {"a": []}, r"x\.a is \[\], expected an integer"),
        (Literal["rows", "columns"], [], "expected one of 'rows', 'columns'"),
        (bool | None, 0, "expected true or false"),
    ],
)
def test_others_are_named(kind, value, said):
    with pytest.raises(ValueError, match=said):
        made(kind, value, "x")


def test_text_without_end_and_halves_of_characters():
    with pytest.raises(ValueError, match="nested too deeply"):
        parsed("[" * 100_000)
    assert not is_text("a\ud800")
    assert is_text("ä😀")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("entries", 0, "site"), [], "site is \\[\\], expected an object"),
        (("entries", 0, "site", "layout"), 1, "layout is 1, expected an object"),
        (("entries", 0, "notes"), [None], r"entries\[0\]\.notes\[0\] is None"),
        (("entries", 0, "owner"), None, r"entries\[0\]\.owner is None, expected text"),
        (("entries", 0, ""), 1, "has '', which is no field of it"),
        (("coverage",), [1], "coverage is \\[1\\], expected an object"),
        (("skipped",), {}, "skipped is {}, expected a list"),
    ],
)
def test_a_damaged_plan_says_where(path, value, said):
    data = json.loads(oftfx.plan(net(), {"*": OFT(4)}).to_json())
    node = data
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(RuleError, match=f"damaged oftfx plan: .*{said}"):
        oftfx.Plan.from_json(json.dumps(data))
    with pytest.raises(RuleError, match="not an oftfx plan"):
        oftfx.Plan.from_json("[" * 100_000)


@pytest.mark.parametrize(
    "site", [{"survival": "x"}, {"update": {}}, {"action": None}, {"bytes_before": 1.5}, {"fqn": "\ud800"}, {"odd": 1}]
)
def test_a_damaged_report_is_none(site):
    right = {"fqn": "a", "format": "bnb8", "action": "kept"}
    assert len(FoldReport.from_json(json.dumps({"sites": [right], "adapters": ["a"]}))) == 1
    for wrong in ({"sites": [right | site], "adapters": []}, {"sites": [right], "adapters": [False]}, {"sites": 1}):
        with pytest.raises(FoldError, match="no report of a fold"):
            FoldReport.from_json(json.dumps(wrong))


@pytest.mark.parametrize(
    "measured",
    [{"perplexity_before": 3.0}, {"perplexity_after": 3.0}, {"perplexity_before": 0.0, "perplexity_after": 3.0}],
)
def test_half_of_a_comparison_is_none(measured):
    """The first was found by tools/fuzz: what shows a report has both."""
    data = {"sites": [{"fqn": "a", "format": "bnb8", "action": "kept"}], "adapters": ["a"]}
    both = {"output_error": 0.5, "perplexity_before": 2.0, "perplexity_after": 3.0}
    assert "2.000 unfolded, 3.000 folded" in str(FoldReport.from_json(json.dumps(data | {"measured": both})))
    with pytest.raises(FoldError, match="perplexity"):
        FoldReport.from_json(json.dumps(data | {"measured": {"output_error": 0.5} | measured}))


@pytest.mark.needs("rich")
def test_text_from_files_cannot_command_the_terminal():
    assert plain("a\x1b[31m\r\u202eä\n") == "a\\x1b[31m\\r\\u202eä\n"
    table = render("t", ["name", "what"], [["[/x]", "[bold]y\x1b[2J"]])
    assert "[/x]" in table
    assert "[bold]y\\x1b[2J" in table
