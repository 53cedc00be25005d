import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

import oftfx
from oftfx.formats.registry import formats

ROOT = Path(__file__).parents[1]


def python(code, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/", **kwargs
    ).stdout


def test_importing_loads_nothing_but_torch_and_the_standard_library():
    code = """
import json, sys
before = set(sys.modules)
import torch
with_torch = set(sys.modules)
import oftfx
first = set(sys.modules) - with_torch
from oftfx import *
second = set(sys.modules) - with_torch
names = lambda found: sorted({m.split('.')[0] for m in found})
print(json.dumps([names(first), names(second), sorted(set(sys.stdlib_module_names))]))
"""
    first, every_name, standard = map(set, json.loads(python(code)))
    assert first <= {"oftfx", *standard}
    # Using every public name still loads no optional package.
    assert every_name <= {"oftfx", "torch", *standard}


def test_importing_takes_no_longer_than_importing_torch():
    code = """
import sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import oftfx
print((time.perf_counter() - middle) / (middle - start))
"""
    extra = sorted(float(python(code)) for _ in range(3))[1]
    assert extra <= 0.10


def test_every_public_name_exists_is_documented_and_no_submodule():
    for name in oftfx.__all__:
        value = getattr(oftfx, name)
        assert value is getattr(oftfx, name)
        if name != "__version__":
            assert (value.__doc__ or "").strip(), name
        # `import oftfx.<name>` would otherwise put a module over the function.
        assert not (ROOT / "oftfx" / f"{name}.py").exists()
        assert not (ROOT / "oftfx" / name).is_dir()
    with pytest.raises(AttributeError, match="no attribute 'transfrom'"):
        oftfx.transfrom  # noqa: B018


def test_passes_are_a_subpackage_and_nothing_lands_beside_the_package(tmp_path):
    source = tmp_path / "source"
    for name in ("oftfx", "passes"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    top = {n.split("/")[0] for n in names}
    assert top == {"oftfx", f"oftfx-{oftfx.__version__}.dist-info"}
    assert {
        *(str(path.relative_to(ROOT)) for path in (ROOT / "oftfx").rglob("*.py")),
        *(f"oftfx/{path.relative_to(ROOT)}" for path in (ROOT / "passes").rglob("*.py")),
        "oftfx/LICENSE",
        "oftfx/py.typed",
        "oftfx/inspecting/tested.json",
        *(str(path.relative_to(ROOT)) for path in (ROOT / "oftfx/pages/templates").iterdir()),
    } <= set(names)
    code = "import oftfx, oftfx.passes, oftfx.formats as f; print(oftfx.__file__, sorted(f.formats()))"
    out = python(code, env={"PYTHONPATH": f"{tmp_path}/site", "PATH": ""})
    assert str(tmp_path) in out
    assert str(sorted(formats())) in out


def test_this_installation_imports_its_passes():
    passes = import_module("oftfx.passes")
    assert passes.FoldRotations.__module__ == "oftfx.passes.fold_rotations"


def test_the_house():
    allowed = {"pyproject.toml", "README.md", "oftfx", "passes", "tests", "tools"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert {t.split("/")[0] for t in tracked if not t.startswith(".")} <= allowed
    for path in [*ROOT.glob("oftfx/**/*.py"), *ROOT.glob("passes/**/*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path
        assert path.name != "utils.py"
    folders = Counter(str(Path(t).parent) for t in tracked if t.endswith(".py") and not t.endswith("__init__.py"))
    assert {f for f, count in folders.items() if count > 12 and not (ROOT / f / "README.md").exists()} == set()


@pytest.mark.needs("importlinter")
def test_an_import_of_a_higher_floor_is_found_in_a_function_too(tmp_path):
    shutil.copytree(ROOT / "oftfx", tmp_path / "oftfx", ignore=shutil.ignore_patterns("passes", "__pycache__"))
    shutil.copytree(ROOT / "passes", tmp_path / "oftfx/passes", ignore=shutil.ignore_patterns("__pycache__"))
    command = [str(Path(sys.executable).with_name("lint-imports")), str(ROOT / "pyproject.toml"), "--no-cache"]

    def lint():
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    done = lint()
    assert done.returncode == 0, done.stdout
    with (tmp_path / "oftfx/formats/layout.py").open("a") as file:
        file.write("\n\ndef wrong() -> None:\n    from oftfx.surgery import plan\n\n    print(plan)\n")
    done = lint()
    assert done.returncode == 1
    assert "oftfx.formats.layout -> oftfx.surgery" in done.stdout
