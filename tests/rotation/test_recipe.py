"""A recipe as a text, which an operator of a recorded or exported program hands on."""

import json

import pytest

from oftfx.errors import GuardError
from oftfx.rotation.recipe import Recipe, read_recipe

RECIPE = Recipe(4, 8, "cayley_neumann", 5, None, block_share=False, copies=1, tied=(0, 0, 1, 1))


def test_there_and_back():
    assert read_recipe(RECIPE.text()) == RECIPE
    bounded = Recipe(4, 8, "cayley", 5, 0.5, block_share=True, copies=2, tied=())
    assert read_recipe(bounded.text()) == bounded


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks": "4"}, "blocks is '4', expected an integer"),
        ({"parameterization": "series"}, "parameterization is 'series', expected one of 'cayley_neumann'"),
        ({"tied": 3}, "tied is 3, expected a list"),
        ({"rank": 3}, "has 'rank', which is no field of it"),
    ],
)
def test_what_is_none(change, said):
    with pytest.raises(GuardError, match=f"which cannot be read: .*{said}.*Record or export the model again"):
        read_recipe(json.dumps(json.loads(RECIPE.text()) | change))


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000], ids=["empty", "cut", "list", "deep"])
def test_what_is_no_object(text):
    with pytest.raises(GuardError, match="which cannot be read"):
        read_recipe(text)
