"""Which format is asked first."""

import subprocess
import sys

import torch.nn as nn

from oftfx.formats.dense import Dense
from oftfx.formats.registry import format_of, formats, register_format

COLD = """
import torch.nn as nn
from oftfx.formats import WeightFormat, format_of, register_format
from oftfx.formats.dense import Dense

class Mine(Dense):
    name = "mine"

mine = register_format(Mine())
assert format_of(nn.Linear(3, 2)) is mine
"""


def test_a_format_registered_before_the_first_look_up_is_asked_first():
    subprocess.run([sys.executable, "-c", COLD], check=True)


def test_the_latest_is_asked_first_and_takes_the_place_of_one_of_its_name():
    class Mine(Dense):
        name = "mine"

    before = formats()
    try:
        first, second = Mine(), Mine()
        register_format(first)
        assert format_of(nn.Linear(3, 2)) is first
        register_format(second)
        assert format_of(nn.Linear(3, 2)) is second
        assert list(formats()) == ["mine", *before]
    finally:
        from oftfx.formats import registry

        registry._formats.clear()
        registry._formats.update(before)
    assert format_of(nn.Linear(3, 2)).name == "dense"
