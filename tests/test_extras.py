"""The trials of `tools/extras`, which a release is made after: each extra has one that worked, or a reason why not."""

import json
import sys
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "tools/results/extras.json").read_text())


@pytest.fixture
def tools(monkeypatch):
    """Its modules."""
    monkeypatch.syspath_prepend(str(ROOT))
    from tools.extras import jobs, required, tested

    yield jobs, required, tested
    for name in [n for n in sys.modules if n == "tools" or n.startswith("tools.")]:
        monkeypatch.delitem(sys.modules, name)


def test_every_extra_was_tried_or_says_why_not(tools):
    jobs, required, _ = tools
    package_alone = {"none", "sdist", "core", "readme"}
    assert RESULTS["reasons"] == jobs.REASONS
    for kind, reasons in jobs.REASONS.items():
        worked = {e for e, found in RESULTS[kind].items() if found["state"] == "works"}
        assert worked | set(reasons) == {*required.EXTRAS, *package_alone}
        assert not worked & set(reasons)
        for extra in worked:
            found = RESULTS[kind][extra]
            assert [s["step"] for s in found["steps"]] == ["pip install", *jobs.JOBS[extra]], extra
            assert {s["state"] for s in found["steps"]} == {"works"}, extra


def test_the_oldest_are_the_lower_bounds(tools):
    """A bound that was moved, or a package that came in, has not been tried."""
    _, required, _ = tools
    for extra, found in RESULTS["oldest"].items():
        if found["state"] == "works":
            for name, floor in required.floors(extra).items():
                assert Version(found["versions"][name].partition("+")[0]) == Version(floor), (extra, name)


def test_what_doctor_tells_is_what_was_tried(tools):
    _, _, tested = tools
    assert json.loads(tested.FILE.read_text()) == tested.ranges(RESULTS)


def test_the_readme_installs_what_was_tried(tools):
    jobs, _, _ = tools
    assert f"[{jobs.README}]" in (ROOT / "README.md").read_text()
