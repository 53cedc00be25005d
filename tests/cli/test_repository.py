from types import SimpleNamespace

import pytest

from tests.cli.command import run

pytestmark = pytest.mark.needs("typer", "rich", "onnx", "onnxruntime")


def oftfx(*arguments):
    done = run("repository", *arguments)
    return SimpleNamespace(returncode=done.status, stdout=done.out, stderr=done.err)


def test_a_repository_from_the_command_line(tmp_path):
    from tests.serving import graphs

    model = graphs.swappable(tmp_path / "m.onnx")
    words = []
    for name, blocks in graphs.rotations("a1", "a2").items():
        words += ["--adapter", f"{name}={graphs.write_adapter(tmp_path / f'{name}.onnx_adapter', blocks)}"]
    out = tmp_path / "models"
    done = oftfx(model, out, "--server", "mlserver", *words, "--version", 3, "--threads", 2)
    assert done.returncode == 0, done.stderr
    assert "adapters: a1, a2" in done.stdout
    assert f"start: mlserver start {out}" in done.stdout
    assert (out / "m/3/adapters/a2.onnx_adapter").is_file()
    twice = oftfx(model, out, "--server", "triton", *words, *words)
    assert twice.returncode == 1
    assert "'a1' is given twice" in twice.stderr
    bad = oftfx(model, out, "--server", "triton", "--adapter", "a1")
    assert bad.returncode == 1
    assert "expected NAME=FILE.onnx_adapter" in bad.stderr
    assert "Traceback" not in bad.stdout + bad.stderr
    assert "expected 'triton' or 'mlserver'" in oftfx(model, out, "--server", "flask").stderr
