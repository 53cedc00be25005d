"""What is installed beside what was tested: versions in order, and the remark that each deserves."""

import json
import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from oftfx.inspecting import packages as module
from oftfx.inspecting.packages import compared, packages

ROOT = Path(__file__).parents[2]
RANGE = {"rich": {"oldest": "13.9.0", "newest": "14.10.1"}}


def of(here, ranges=RANGE, requirement='rich>=13.2; extra == "cli"'):
    (found,) = compared([requirement], lambda name: here, ranges)
    return found


@pytest.mark.parametrize(
    ("here", "remark"),
    [
        ("13.9.0", ""),
        ("14.9", ""),  # as numbers: 9 is before 10
        ("14.10.1", ""),
        ("14.10.1+cpu", ""),  # a build of the same version
        ("14.10.2", "newer than tested"),
        ("14.10.1.post1", "newer than tested"),
        ("13.8", "older than tested"),
        ("13.10", ""),
        ("13.1", "older than allowed"),
        ("9.0", "older than allowed"),
        ("", ""),
    ],
)
def test_a_version_gets_the_remark_that_it_deserves(here, remark):
    assert of(here).remark == remark


def test_a_package_without_a_tested_version_says_so():
    assert of("14.0", {}).remark == "never tested"
    assert (of("14.0", {}).oldest, of("14.0", {}).newest) == ("", "")


def test_requirements_of_every_form():
    found = compared(
        [
            "torch>=2.7",
            'torch>=2.10; extra == "torchao"',
            "safetensors[torch]>=0.4.5",
            'transformers>=5.0; extra == "hf"',
            "transformers>=5.10 ; extra == 'eetq'",
            "transformers>=5.2; extra == 'inc'",
            'oftfx[hf,onnx]; extra == "genai"',
            'vllm<0.33,>=0.32; extra == "vllm"',
            'triton>=3.3; platform_system == "Linux" and extra == "triton"',
            'peft==0.21.2; extra == "test"',
        ],
        lambda name: "",
        {},
    )
    assert [(p.name, p.extras, p.allowed) for p in found] == [
        ("torch", (), "2.7"),
        ("safetensors", (), "0.4.5"),
        ("transformers", ("eetq", "hf", "inc"), "5.0"),
        ("vllm", ("vllm",), "0.32"),
        ("triton", ("triton",), "3.3"),
        ("peft", ("test",), "0.21.2"),
    ]


def test_this_installation_is_read_as_packaging_reads_it():
    found = {p.name: p for p in packages()}
    wanted = [Requirement(r) for r in metadata.requires("oftfx")]
    assert set(found) == {r.name for r in wanted} - {"oftfx"}
    assert found["torch"].here == metadata.version("torch")
    for requirement in wanted:
        for specifier in requirement.specifier:
            if specifier.operator in (">=", "=="):
                assert Version(found[requirement.name].allowed) <= Version(specifier.version)
    assert found["torch"].extras == ()
    assert "hf" in found["transformers"].extras


def test_what_was_tested_is_in_order_and_within_the_bounds():
    allowed = {p.name: p.allowed for p in packages()}
    for name, known in module.tested().items():
        assert set(known) == {"oldest", "newest"}
        assert Version(allowed[name]) <= Version(known["oldest"]) <= Version(known["newest"]), name


def test_the_pins_of_the_tools_are_not_newer_than_what_was_tested():
    """They are what the tests run with; a newer pin asks for `tools/extras` to be run again."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "tools/constraints.txt").read_text(), flags=re.MULTILINE))
    known = module.tested()
    assert len(set(pins) & set(known)) > 10
    assert [n for n in set(pins) & set(known) if Version(pins[n]) > Version(known[n]["newest"])] == []


def test_the_file_is_small():
    text = (ROOT / "oftfx/inspecting/tested.json").read_text()
    assert json.loads(text) == module.tested()
    assert len(text) < 8000
