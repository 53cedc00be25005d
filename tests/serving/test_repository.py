"""What is written, and what is refused before anything is written."""

import errno
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import oftfx
from oftfx import files
from oftfx.errors import ExportError, MissingExtraError

pytestmark = pytest.mark.needs("onnx", "onnxruntime")

SOURCES = Path(oftfx.__file__).parent / "serving/copied"
RUNTIME = [f"oftfx_runtime/{n}.py" for n in ("__init__", "adapters", "contract", "errors", "protocol", "served_model")]


@pytest.fixture
def graphs():
    from tests.serving import graphs

    return graphs


@pytest.fixture
def model(graphs, tmp_path):
    return graphs.swappable(tmp_path / "tenant.onnx")


@pytest.fixture
def adapters(graphs, tmp_path):
    return {
        n: graphs.write_adapter(tmp_path / f"file-{n}.onnx_adapter", b) for n, b in graphs.rotations("a1", "a2").items()
    }


def write(*arguments, **options):
    return oftfx.serving.write_repository(*arguments, **options)


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_triton_repository(model, adapters, tmp_path):
    out = tmp_path / "models"
    written = write(
        model,
        out,
        server="triton",
        adapters=adapters,
        max_batch_size=16,
        preferred_batch_sizes=(4, 8),
        max_queue_delay=0.0005,
        instances=2,
        threads=3,
    )
    version = ["adapters/a1.onnx_adapter", "adapters/a2.onnx_adapter", "model.onnx", "model.py", *RUNTIME]
    assert tree(out) == [*(f"tenant/1/{f}" for f in version), "tenant/config.pbtxt"]
    assert (out / "tenant/config.pbtxt").read_text() == (
        'name: "tenant"\n'
        'backend: "python"\n'
        "max_batch_size: 16\n"
        "input [\n"
        '  { name: "x" data_type: TYPE_FP32 dims: [ -1, 4 ] }\n'
        "]\n"
        "output [\n"
        '  { name: "y" data_type: TYPE_FP32 dims: [ -1, 4 ] }\n'
        "]\n"
        "# How runs are made: by all versions alike.\n"
        "dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 500 }\n"
        "instance_group [ { kind: KIND_CPU count: 2 } ]\n"
        "version_policy: { all { } }\n"
        'parameters { key: "threads" value: { string_value: "3" } }\n'
    )
    # The very files that are tested.
    for path in RUNTIME:
        assert (written.model / path).read_bytes() == (SOURCES / "runtime" / Path(path).name).read_bytes()
    assert (written.model / "model.py").read_bytes() == (SOURCES / "triton_model.py").read_bytes()
    assert (written.adapters, written.backend) == (("a1", "a2"), "python")
    assert written.command == (
        f"tritonserver --model-repository={out} --http-address=127.0.0.1 --http-port=8000 "
        "--grpc-address=127.0.0.1 --grpc-port=8001 --allow-metrics=false"
    )
    assert "a1, a2" in str(written)
    assert written.command in str(written)


def test_an_mlserver_directory(model, adapters, tmp_path):
    out = tmp_path / "models"
    written = write(model, out, server="mlserver", name="m", version=7, adapters=adapters, threads=2, grpc_port=9001)
    version = ["model-settings.json", "model.onnx", "oftfx_mlserver.py", *RUNTIME]
    files = [f"m/7/{f}" for f in ("adapters/a1.onnx_adapter", "adapters/a2.onnx_adapter", *version)]
    assert tree(out) == [*files, "settings.json"]
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["host"], settings["http_port"], settings["grpc_port"]) == ("127.0.0.1", 8080, 9001)
    assert settings["parallel_workers"] == 0
    found = json.loads((written.model / "model-settings.json").read_text())
    assert found["name"] == "m"
    assert found["implementation"] == "oftfx_mlserver.OftfxModel"
    assert found["max_batch_size"] == 0  # MLServer's own batches would mix the adapters
    assert found["parameters"] == {
        "uri": "./model.onnx",
        "version": "7",
        "extra": {"max_batch_size": 8, "max_queue_delay": 0.002, "instances": 1, "threads": 2},
    }
    assert found["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, -1, 4]}]
    assert (written.model / "oftfx_mlserver.py").read_bytes() == (SOURCES / "mlserver_model.py").read_bytes()
    assert written.command == f"mlserver start {out}"


def test_backends_of_triton(graphs, model, tmp_path):
    fixed = graphs.fixed(tmp_path / "fixed.onnx")
    written = write(fixed, tmp_path / "a", server="triton", threads=2, backend="onnxruntime")
    assert written.backend == "onnxruntime"
    assert tree(tmp_path / "a") == ["fixed/1/model.onnx", "fixed/config.pbtxt"]
    config = (tmp_path / "a/fixed/config.pbtxt").read_text()
    assert 'backend: "onnxruntime"' in config
    assert 'key: "intra_op_thread_count" value: { string_value: "2" }' in config
    assert write(fixed, tmp_path / "b", server="triton").backend == "python"  # which refuses unknown adapters
    with pytest.raises(ExportError, match="ONNX Runtime backend cannot choose adapters, and the model is 'swappable'"):
        write(model, tmp_path / "c", server="triton", backend="onnxruntime")
    assert not tree(tmp_path / "c")
    mixed = graphs.mixed(tmp_path / "mixed.onnx", graphs.rotations("a1", "a2"))
    written = write(mixed, tmp_path / "d", server="triton")
    assert (written.backend, written.adapters) == ("python", ("a1", "a2"))
    assert "adapter_index" not in (tmp_path / "d/mixed/config.pbtxt").read_text()


def test_shapes_that_triton_writes_in_its_own_way(graphs, tmp_path):
    config = Path(
        write(graphs.types(tmp_path / "t.onnx"), tmp_path / "a", server="triton").path / "t/config.pbtxt"
    ).read_text()
    assert '{ name: "text" data_type: TYPE_STRING dims: [ 3 ] }' in config
    assert '{ name: "rows" data_type: TYPE_INT32 dims: [ 1 ] reshape: { shape: [ ] } }' in config
    # No common batch axis: Triton must form no batches.
    write(graphs.fixed(tmp_path / "two.onnx", axis=2), tmp_path / "a", server="triton")
    config = (tmp_path / "a/two/config.pbtxt").read_text()
    assert "max_batch_size: 0\n" in config
    assert "dims: [ 2, 4 ]" in config
    assert "dynamic_batching" not in config


@pytest.mark.parametrize("server", ["triton", "mlserver"])
def test_versions_and_models_stand_beside_each_other(graphs, model, adapters, tmp_path, server):
    out = tmp_path / "models"
    first = write(model, out, server=server, adapters=adapters)
    before = {f: (first.model / f).read_bytes() for f in tree(first.model)}
    with pytest.raises(ExportError, match=r"tenant/1 is there already; choose another version"):
        write(model, out, server=server)
    other = graphs.swappable(tmp_path / "tenant2.onnx", interface=99)
    second = write(other, out, server=server, name="tenant", version=2)
    assert second.model == out / "tenant/2"
    assert second.adapters == ()
    assert (second.model / "adapters").is_dir()  # adapters can be put there later
    assert {f: (first.model / f).read_bytes() for f in tree(first.model)} == before
    write(graphs.fixed(tmp_path / "fixed.onnx"), out, server=server)
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["fixed", "tenant"]
    wider = graphs.swappable(tmp_path / "wide.onnx", size=6)
    if server == "triton":
        with pytest.raises(ExportError, match="the versions that are there have other inputs"):
            write(wider, out, server=server, name="tenant", version=3)
        assert not (out / "tenant/3").exists()
    else:  # every version has its own settings, but all share the ports
        write(wider, out, server=server, name="tenant", version=3)
        with pytest.raises(ExportError, match="http_port is 8080 there and 8099 here"):
            write(wider, out, server=server, name="tenant", version=4, http_port=8099)
    assert not list(out.glob(".oftfx*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 2}, "threads is 3 there and 2 here"),
        ({"threads": None}, "threads is 3 there and not set here"),
        ({"instances": 1}, "instances is 2 there and 1 here"),
        ({"max_queue_delay": 0.002}, "max_queue_delay (microseconds) is 500 there and 2000 here"),
        ({"preferred_batch_sizes": (4,)}, "preferred_batch_sizes is 4 8 there and 4 here"),
    ],
)
def test_a_version_does_not_change_the_runs_of_another(model, tmp_path, options, message):
    asked = {"threads": 3, "instances": 2, "max_queue_delay": 0.0005, "preferred_batch_sizes": (4, 8)}
    config = write(model, tmp_path / "out", server="triton", **asked).path / "tenant/config.pbtxt"
    edited = config.read_text() + "# by hand: threads and count: 9\nmodel_warmup [ ]\n"
    config.write_text(edited)
    with pytest.raises(ExportError, match=re.escape(message)):
        write(model, tmp_path / "out", server="triton", version=2, **asked | options)
    assert not (tmp_path / "out/tenant/2").exists()
    write(model, tmp_path / "out", server="triton", version=2, **asked)
    assert config.read_text() == edited


def test_settings_of_mlserver_that_were_edited_stay(graphs, model, tmp_path):
    settings = write(model, tmp_path / "out", server="mlserver").path / "settings.json"
    edited = json.dumps(json.loads(settings.read_text()) | {"debug": True, "http_port": 9000})
    settings.write_text(edited)
    with pytest.raises(ExportError, match="http_port is 9000 there and 8080 here"):
        write(model, tmp_path / "out", server="mlserver", version=2)
    write(model, tmp_path / "out", server="mlserver", version=2, http_port=9000)
    write(graphs.fixed(tmp_path / "other.onnx"), tmp_path / "out", server="mlserver", http_port=9000)
    assert settings.read_text() == edited
    for damaged in ("{", "[1]"):
        settings.write_text(damaged)
        with pytest.raises(ExportError, match="settings.json: expected a JSON object"):
            write(model, tmp_path / "out", server="mlserver", version=3)
        assert settings.read_text() == damaged


def test_one_row_turns_sharing_off(model, tmp_path):
    """Triton would refuse a second row at 1; at 0 it hands on each request as it is."""
    config = (write(model, tmp_path, server="triton", max_batch_size=1).path / "tenant/config.pbtxt").read_text()
    assert "max_batch_size: 0\n" in config
    assert "dims: [ -1, -1, 4 ]" in config
    assert "dynamic_batching" not in config


@pytest.mark.parametrize("server", ["triton", "mlserver"])
def test_the_command_is_for_a_shell(model, tmp_path, server):
    out = tmp_path / "it's $HOME {here}"
    written = write(model, out, server=server)
    words = shlex.split(written.command)
    assert str(out) in (word.removeprefix("--model-repository=") for word in words)
    assert len(words) == {"triton": 7, "mlserver": 3}[server]


def test_bad_adapters_are_refused_and_nothing_is_left(graphs, model, tmp_path):
    out = tmp_path / "models"
    foreign = graphs.write_adapter(tmp_path / "f.onnx_adapter", graphs.rotations("a")["a"], interface=5)
    with pytest.raises(oftfx.serving.ServingError, match="model version is 5, the model's oftfx.interface is 4711"):
        write(model, out, server="triton", adapters={"f": foreign})
    with pytest.raises(oftfx.serving.ServingError, match="it takes none; export it with adapters='swappable'"):
        write(graphs.fixed(tmp_path / "g.onnx"), out, server="mlserver", adapters={"f": foreign})
    with pytest.raises(ExportError, match="missing.onnx_adapter is not there"):
        write(model, out, server="triton", adapters={"f": tmp_path / "missing.onnx_adapter"})
    for name in ("", "../a", "a b", ".a", "a/b"):
        with pytest.raises(ExportError, match="cannot name an adapter"):
            write(model, out, server="triton", adapters={name: foreign})
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("server", ["triton", "mlserver"])
def test_a_full_disk_leaves_nothing_and_every_version_that_was_there(model, tmp_path, monkeypatch, server):
    out = tmp_path / "models"
    real = files.rename

    def rename(source, target):
        if target == out / "tenant" / "2":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        real(source, target)

    monkeypatch.setattr("oftfx.serving.repository.rename", rename)
    with pytest.raises(ExportError, match="models: cannot be written to: No space left on device"):
        write(model, out, server=server, version=2)
    assert not out.exists()
    write(model, out, server=server)
    before = {n: (out / n).read_bytes() for n in tree(out)}
    with pytest.raises(ExportError, match="No space left on device"):
        write(model, out, server=server, version=2)
    assert {n: (out / n).read_bytes() for n in tree(out)} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server": "torchserve"}, "got 'torchserve', expected 'triton' or 'mlserver'"),
        ({"server": "triton", "backend": "tensorrt"}, "got 'tensorrt', expected"),
        ({"server": "mlserver", "backend": "python"}, "MLServer has one, leave it out"),
        ({"server": "triton", "name": "../m"}, "expected a directory's name"),
        ({"server": "triton", "version": 0}, "version: got 0, expected a whole number from 1"),
        ({"server": "triton", "version": "2"}, "version: got '2'"),
        ({"server": "triton", "max_batch_size": 0}, "max_batch_size: got 0"),
        ({"server": "triton", "instances": 1.5}, "instances: got 1.5"),
        ({"server": "triton", "threads": 0}, "threads: got 0"),
        ({"server": "triton", "http_port": 0}, "http_port: got 0, expected 1 to 65535"),
        ({"server": "mlserver", "http_port": -5}, "http_port: got -5"),
        ({"server": "triton", "grpc_port": 65536}, "grpc_port: got 65536"),
        ({"server": "triton", "preferred_batch_sizes": (4, 9)}, "got 9, expected 1 to 8"),
        ({"server": "mlserver", "max_queue_delay": -1.0}, "max_queue_delay: got -1.0"),
    ],
)
def test_arguments(model, tmp_path, options, message):
    with pytest.raises(ExportError, match=re.escape(message)):
        write(model, tmp_path / "models", **options)
    assert not (tmp_path / "models").exists() or not tree(tmp_path / "models")


def test_models_that_are_not_there_or_cannot_be_read(tmp_path):
    with pytest.raises(ExportError, match="m.onnx is no file"):
        write(tmp_path / "m.onnx", tmp_path / "a", server="triton")


def test_without_onnx_runtime_the_extra_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for use in (lambda: oftfx.serving.ServedModel, lambda: write(model, tmp_path / "m", server="triton")):
        with pytest.raises(MissingExtraError, match=r"pip install 'oftfx\[onnx\]'"):
            use()
    with pytest.raises(AttributeError, match="no attribute 'write_repositry'"):
        oftfx.serving.write_repositry  # noqa: B018


def test_external_data_comes_along_under_the_name_that_the_model_looks_for(graphs, adapters, tmp_path):
    import onnx

    from oftfx.serving import Request, ServedModel

    source = tmp_path / "source"
    source.mkdir()
    found = onnx.load(str(graphs.fixed(tmp_path / "f.onnx", factor=np.float32(3))))
    big = np.arange(400, dtype=np.float32).reshape(100, 4)
    found.graph.initializer.append(onnx.numpy_helper.from_array(big, "big"))
    found.graph.node.append(onnx.helper.make_node("Gather", ["big", "zero"], ["row"]))
    found.graph.initializer.append(onnx.numpy_helper.from_array(np.array(99), "zero"))
    found.graph.node.append(onnx.helper.make_node("Add", ["y", "row"], ["sum"]))
    found.graph.output[0].name = "sum"
    onnx.save(found, str(source / "f.onnx"), save_as_external_data=True, location="weights.bin", size_threshold=100)
    written = write(source / "f.onnx", tmp_path / "models", server="mlserver")
    shutil.rmtree(source)
    assert (written.model / "weights.bin").stat().st_size >= 1600
    got = ServedModel(written.model / "model.onnx").run(Request({"x": np.ones((2, 4), np.float32)}))["sum"]
    assert np.array_equal(got, np.broadcast_to(3 + big[99], (2, 4)))
