"""What a user needs to write a format or a pass can be had by public names, and is enough."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PUBLIC = ("oftfx", "oftfx.errors", "oftfx.formats", "oftfx.passes", "oftfx.serving")


@pytest.mark.parametrize("package", ["oftfx.formats", "oftfx.passes", "oftfx.serving"])
def test_every_name_exists_and_is_documented(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, type) or callable(value):
            assert (value.__doc__ or "").strip(), name
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        module.nothing_of_this_name  # noqa: B018


@pytest.mark.parametrize("example", ["write_a_format", "write_a_pass"])
def test_the_examples_use_public_names_only(example):
    tree = ast.parse((ROOT / f"tests/examples/{example}.py").read_text())
    used = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    used |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert {u for u in used if u.startswith("oftfx")} <= set(PUBLIC)


def test_a_format_of_ones_own_registered_cold_passes_the_conformance_suite():
    """In a process of its own: what is registered stays."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.formats.own_format", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/formats/test_conformance.py", "-k", "rows"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > 30
    assert "failed" not in done.stdout


def test_names_are_written_out_for_type_checkers():
    """`mypy --strict`, which tools/check runs on the same file, takes no name that `__all__` computes."""
    import oftfx

    assert set(oftfx.__all__) == {"__version__", *oftfx._HOME}
    tree = ast.parse(Path(oftfx.__file__).read_text())
    (names,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
    assert ast.literal_eval(names) == oftfx.__all__


def test_what_a_type_checker_sees_runs(tmp_path):
    from tests.typed_interface import road

    assert road(tmp_path) < 1e-6
