"""The runtime, in this process: the same package that `write_repository` copies into a repository."""

import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

from oftfx.errors import OftfxError

pytestmark = pytest.mark.needs("onnx", "onnxruntime")


@pytest.fixture
def runtime():
    from oftfx.serving.copied import runtime

    return runtime


@pytest.fixture
def graphs():
    from tests.serving import graphs

    return graphs


@pytest.fixture
def folder(tmp_path, graphs):
    """A swappable model and the adapters a1 and a2."""
    graphs.swappable(tmp_path / "model.onnx")
    (tmp_path / "adapters").mkdir()
    for name, blocks in graphs.rotations("a1", "a2").items():
        graphs.write_adapter(tmp_path / f"adapters/{name}.onnx_adapter", blocks)
    return tmp_path


def opened(runtime, folder):
    return runtime.ServedModel(folder / "model.onnx", adapters=folder / "adapters", threads=1)


def x(batch=2, length=3, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, length, 4)).astype(np.float32)


def choose(name):
    return {} if name is None else {"adapter": name}


def test_each_request_has_its_adapter_and_the_base_comes_back(runtime, graphs, folder):
    model, blocks = opened(runtime, folder), graphs.rotations("a1", "a2")
    assert (model.mode, model.batched, model.adapter_names()) == ("swappable", True, ["a1", "a2"])
    for name in (None, "a1", "a2", None, "", "a1"):
        got = model.run(runtime.Request({"x": x()}, choose(name)))["y"]
        expected = x().astype(np.float64) @ (blocks[name] if name else np.eye(4))
        assert np.abs(got - expected).max() < 2e-6


@pytest.mark.parametrize("kind", ["swappable", "mixed"])
def test_a_batch_of_different_adapters_and_shapes_gives_each_its_own(runtime, graphs, folder, kind, monkeypatch):
    blocks = graphs.rotations("a1", "a2")
    if kind == "mixed":
        graphs.mixed(folder / "mixed.onnx", blocks)
        model = runtime.ServedModel(folder / "mixed.onnx")
        assert model.adapter_names() == ["a1", "a2"]
        assert [i.name for i in model.inputs] == ["x"]
    else:
        model = opened(runtime, folder)
    runs = []
    inner = model._session
    monkeypatch.setattr(model, "_session", Counting(inner, runs))
    asked = [("a1", 2, 3), (None, 1, 3), ("a2", 3, 3), ("a1", 1, 3), (None, 2, 5), ("a2", 1, 3), ("", 1, 3)]
    requests = [runtime.Request({"x": x(batch, length, i)}, choose(n)) for i, (n, batch, length) in enumerate(asked)]
    for i, ((name, batch, length), answer) in enumerate(zip(asked, model.run_all(requests), strict=True)):
        expected = x(batch, length, i).astype(np.float64) @ (blocks[name] if name else np.eye(4))
        assert answer["y"].shape == (batch, length, 4)
        assert np.abs(answer["y"] - expected).max() < 2e-6
    # Swappable: a1, base, a2 of length 3, and the base of length 5. Mixed: one run for each length.
    assert sorted(runs) == ([2, 2, 3, 4] if kind == "swappable" else [2, 9])


class Counting:
    """Notes the rows of each run."""

    def __init__(self, inner, runs):
        self.inner, self.runs = inner, runs

    def run(self, names, feeds, options):
        self.runs.append(len(feeds["x"]))
        return self.inner.run(names, feeds, options)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"adapter": "a3"}, r"unknown adapter 'a3'; there are: a1, a2; "),
        ({"adapter": "../adapters/a1"}, r"unknown adapter '\.\./adapters/a1'; there are: a1, a2"),
        ({"adapter": "a1\n"}, "unknown adapter"),
        ({"adapter": "a1,a2"}, "unknown adapter 'a1,a2'"),
        ({"adapter": ["a1", "a2"]}, r"is \['a1', 'a2'\], expected one name"),
        ({"adapter": 1}, "is 1, expected one name"),
        ({"adapter": None}, "is None, expected one name"),
        ({"adapters": "a1"}, "parameter 'adapters' means nothing"),
        ({"Adapter": "a1"}, "parameter 'Adapter' means nothing"),
    ],
)
@pytest.mark.parametrize("kind", ["swappable", "mixed"])
def test_a_wrong_adapter_is_never_the_base_model(runtime, graphs, folder, parameters, message, kind):
    model = opened(runtime, folder)
    if kind == "mixed":
        model = runtime.ServedModel(graphs.mixed(folder / "mixed.onnx", graphs.rotations("a1", "a2")))
    with pytest.raises(runtime.RequestError, match=message):
        model.run(runtime.Request({"x": x()}, parameters))
    assert issubclass(runtime.RequestError, OftfxError)
    # In a batch it fails alone.
    wrong, right = model.run_all([runtime.Request({"x": x()}, parameters), runtime.Request({"x": x()}, choose("a1"))])
    assert isinstance(wrong, runtime.RequestError)
    assert right["y"].shape == (2, 3, 4)


def test_models_without_adapters_refuse_a_name(runtime, graphs, folder):
    fixed = runtime.ServedModel(graphs.fixed(folder / "fixed.onnx"))
    row = np.ones((1, 4), np.float32)
    assert np.array_equal(fixed.run(runtime.Request({"x": row}))["y"], 2 * row)
    with pytest.raises(runtime.RequestError, match="unknown adapter 'a1': this model has no adapters"):
        fixed.run(runtime.Request({"x": row}, {"adapter": "a1"}))
    with pytest.raises(runtime.ServingError, match="holds adapters, and .* is 'fixed': it takes none"):
        runtime.ServedModel(folder / "fixed.onnx", adapters=folder / "adapters")
    bare = runtime.ServedModel(folder / "model.onnx")
    with pytest.raises(runtime.RequestError, match="was started without adapters"):
        bare.run(runtime.Request({"x": x()}, {"adapter": "a1"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interface": 4712}, "model version is 4712, the model's oftfx.interface is 4711"),
        ({"name": "other.oft.blocks"}, "holds 'other.oft.blocks', which the model has not"),
        ({"size": 5}, r"\[5, 5\], the model's is tensor\(float\) \[4, 4\]"),
        ({"dtype": np.float64}, r"tensor\(double\) \[4, 4\], the model's is tensor\(float\)"),
        ({"bytes": b"no flatbuffer at all"}, "cannot be read as an .onnx_adapter file"),
        ({"bytes": b""}, "cannot be read as an .onnx_adapter file"),
    ],
)
def test_an_adapter_of_another_model_stops_the_start(runtime, graphs, folder, change, message):
    path = folder / "adapters/b.onnx_adapter"
    blocks = graphs.rotations("b", size=change.get("size", 4))["b"].astype(change.get("dtype", np.float32))
    graphs.write_adapter(path, blocks, change.get("interface", 4711), change.get("name", graphs.BLOCKS))
    if "bytes" in change:
        path.write_bytes(change["bytes"])
    with pytest.raises(runtime.ServingError, match=message) as caught:
        opened(runtime, folder)
    assert "b.onnx_adapter" in str(caught.value)


def test_the_directory_is_the_truth_while_the_model_runs(runtime, graphs, folder):
    model, blocks = opened(runtime, folder), graphs.rotations("a1", "a2", "new", "other")

    def run(name):
        return model.run(runtime.Request({"x": x()}, {"adapter": name}))["y"]

    with pytest.raises(runtime.RequestError, match="unknown adapter 'new'"):
        run("new")
    graphs.write_adapter(folder / "adapters/new.onnx_adapter", blocks["new"])
    assert np.abs(run("new") - x() @ blocks["new"]).max() < 2e-6
    graphs.write_adapter(folder / "adapters/new.onnx_adapter", blocks["other"])
    assert np.abs(run("new") - x() @ blocks["other"]).max() < 2e-6
    graphs.write_adapter(folder / "adapters/new.onnx_adapter", blocks["other"], interface=1)
    with pytest.raises(runtime.ServingError, match="exported for another model") as caught:
        run("new")
    assert not isinstance(caught.value, runtime.RequestError)  # the server's fault, not the sender's
    (folder / "adapters/new.onnx_adapter").unlink()
    with pytest.raises(runtime.RequestError, match="there are: a1, a2;"):
        run("new")
    assert np.abs(run("a1") - x() @ blocks["a1"]).max() < 2e-6


def test_every_type_passes_unchanged(runtime, graphs, tmp_path):
    model = runtime.ServedModel(graphs.types(tmp_path / "types.onnx"))
    assert {t.name: t.datatype for t in model.inputs} == {
        **{name: datatype for name, (_, datatype) in graphs.TYPES.items()},
        "rows": "INT32",
    }
    assert {t.shape for t in model.inputs} == {(-1, 3), (-1,)}
    requests = [runtime.Request(graphs.typed_inputs(rows)) for rows in (1, 3, 2)]
    for request, answer in zip(requests, model.run_all(requests), strict=True):
        for name, array in request.inputs.items():
            assert answer[f"{name}_out"].dtype == array.dtype
            assert np.array_equal(answer[f"{name}_out"], array), name
    latin = graphs.typed_inputs() | {"text": np.full((2, 3), "größe".encode("latin-1"), dtype=object)}
    with pytest.raises(runtime.RequestError, match="input 'text' holds bytes that are not UTF-8"):
        model.run(runtime.Request(latin))
    encoded = graphs.typed_inputs()
    encoded["text"] = np.array([t.encode() for t in encoded["text"].reshape(-1)], dtype=object).reshape(2, 3)
    assert np.array_equal(model.run(runtime.Request(encoded))["text_out"], graphs.typed_inputs()["text"])


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ({"y": x()}, None, r"inputs: got \['y'\], expected \['x'\]"),
        ({}, None, r"inputs: got \[\]"),
        ({"x": x(), "layer.oft.blocks": np.eye(4, dtype=np.float32)}, None, r"expected \['x'\]"),
        ({"x": x().astype(np.float64)}, None, "input 'x' is float64, expected float32"),
        ({"x": x()[0]}, None, r"shape \[3, 4\], expected \[-1, -1, 4\]"),
        ({"x": x()[:, :, :3]}, None, r"shape \[2, 3, 3\]"),
        ({"x": x()}, ["z"], "output 'z' is not there; the model has y"),
    ],
)
def test_wrong_requests_say_what_is_expected(runtime, folder, inputs, outputs, message):
    with pytest.raises(runtime.RequestError, match=message):
        opened(runtime, folder).run(runtime.Request(inputs, {}, outputs))


def test_inputs_of_different_lengths_and_refused_values(runtime, graphs, tmp_path):
    model = runtime.ServedModel(graphs.types(tmp_path / "types.onnx"))
    with pytest.raises(runtime.RequestError, match="axis 'batch' is 2 in 'text' and 3 in 'rows'"):
        model.run(runtime.Request({**graphs.typed_inputs(2), "rows": np.zeros(3, np.int32)}))
    with pytest.raises(runtime.RequestError, match=r"'text' is int64, expected text"):
        model.run(runtime.Request({**graphs.typed_inputs(2), "text": np.zeros((2, 3), np.int64)}))


def test_what_onnx_runtime_refuses_fails_alone(runtime, graphs, tmp_path):
    """The second request reads a row past the table; the others were to run together with it."""
    from onnx import TensorProto, helper

    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    graphs.save(
        tmp_path / "m.onnx",
        [helper.make_node("Gather", ["table", "i"], ["y"])],
        [graphs.value("i", TensorProto.INT64, ["batch"])],
        [graphs.value("y", TensorProto.FLOAT, ["batch", 4])],
        [("table", table)],
        {},
    )
    model = runtime.ServedModel(tmp_path / "m.onnx")
    requests = [runtime.Request({"i": np.array(i)}) for i in ([0, 2], [7], [1])]
    first, second, third = model.run_all(requests)
    assert np.array_equal(first["y"], table[[0, 2]])
    assert isinstance(second, runtime.RequestError)
    assert "ONNX Runtime refuses" in str(second)
    assert np.array_equal(third["y"], table[[1]])


def test_models_that_cannot_be_served(runtime, graphs, tmp_path):
    from onnx import TensorProto, helper

    (tmp_path / "a.onnx").write_bytes(b"nothing")
    with pytest.raises(runtime.ServingError, match="cannot be opened by ONNX Runtime"):
        runtime.ServedModel(tmp_path / "a.onnx")
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16)]
    ends = [graphs.value("x", TensorProto.FLOAT, [2])], [graphs.value("y", TensorProto.BFLOAT16, [2])]
    with pytest.raises(runtime.ServingError, match=r"'y' is tensor\(bfloat16\), which the protocol cannot carry"):
        runtime.ServedModel(graphs.save(tmp_path / "b.onnx", nodes, *ends, [], {}))
    nodes = [helper.make_node("Neg", ["x"], ["y"])]
    ends = [graphs.value("x", TensorProto.FLOAT, [2])], [graphs.value("y", TensorProto.FLOAT, [2])]
    with pytest.raises(runtime.ServingError, match="'swapped', expected one of fixed, swappable"):
        runtime.ServedModel(graphs.save(tmp_path / "c.onnx", nodes, *ends, [], {"oftfx.adapter_mode": "swapped"}))


def test_axes_that_are_not_one_batch_are_run_one_by_one(runtime, graphs, tmp_path):
    from onnx import TensorProto, helper

    model = runtime.ServedModel(graphs.fixed(tmp_path / "two.onnx", axis=2))
    assert not model.batched
    requests = [runtime.Request({"x": np.full((2, 4), i, np.float32)}) for i in range(3)]
    assert [answer["y"][0, 0] for answer in model.run_all(requests)] == [0.0, 2.0, 4.0]
    ends = [graphs.value("x", TensorProto.FLOAT, ["a", "b"]), graphs.value("y", TensorProto.FLOAT, ["b", "c"])]
    nodes, out = [helper.make_node("MatMul", ["x", "y"], ["z"])], [graphs.value("z", TensorProto.FLOAT, ["a", "c"])]
    assert not runtime.ServedModel(graphs.save(tmp_path / "p.onnx", nodes, ends, out, [], {})).batched


def similarity(graphs, path):
    """``z = a @ b^T``: each row of `a` beside each row of `b`, as CLIP's logits."""
    from onnx import TensorProto, helper

    nodes = [helper.make_node("Transpose", ["b"], ["bt"], perm=[1, 0]), helper.make_node("MatMul", ["a", "bt"], ["z"])]
    ends = [graphs.value(n, TensorProto.FLOAT, ["batch", 4]) for n in "ab"]
    return graphs.save(path, nodes, ends, [graphs.value("z", TensorProto.FLOAT, ["batch", "batch"])], [], {})


@pytest.mark.parametrize(("other", "batched"), [("2*batch", False), ("batch + 1", False), ("batches", True)])
def test_an_axis_that_is_made_of_the_batch_is_no_free_axis(runtime, graphs, tmp_path, other, batched):
    from onnx import TensorProto, helper

    ends = [[graphs.value(n, TensorProto.FLOAT, ["batch", other])] for n in "xy"]
    path = graphs.save(tmp_path / "m.onnx", [helper.make_node("Neg", ["x"], ["y"])], *ends, [], {})
    assert runtime.ServedModel(path).batched is batched


def test_rows_that_stand_beside_each_other_share_no_run(runtime, graphs, tmp_path):
    model = runtime.ServedModel(similarity(graphs, tmp_path / "clip.onnx"))
    assert not model.batched
    asked = [{n: x(1, rows, 10 * rows + i)[0] for i, n in enumerate("ab")} for rows in (2, 3, 1)]
    for inputs, answer in zip(asked, model.run_all([runtime.Request(i) for i in asked]), strict=True):
        expected = inputs["a"].astype(np.float64) @ inputs["b"].T
        assert answer["z"].shape == expected.shape
        assert np.abs(answer["z"] - expected).max() < 2e-6


@pytest.mark.parametrize("kind", ["swappable", "mixed"])
def test_sharing_can_be_turned_off(runtime, graphs, folder, kind, monkeypatch):
    blocks, runs = graphs.rotations("a1", "a2"), []
    path = folder / "model.onnx" if kind == "swappable" else graphs.mixed(folder / "mixed.onnx", blocks)
    adapters = folder / "adapters" if kind == "swappable" else None
    model = runtime.ServedModel(path, adapters=adapters, share_runs=False)
    monkeypatch.setattr(model, "_session", Counting(model._session, runs))
    requests = [runtime.Request({"x": x(rows, 3, rows)}, choose("a1")) for rows in (2, 1, 3)]
    for rows, answer in zip((2, 1, 3), model.run_all(requests), strict=True):
        assert np.abs(answer["y"] - x(rows, 3, rows).astype(np.float64) @ blocks["a1"]).max() < 2e-6
    assert runs == [2, 1, 3]


def test_axes_of_one_name_have_one_length(runtime, graphs, tmp_path):
    """``y = a + b``: ONNX Runtime broadcasts a length of 1, and the mask of one token would serve for all."""
    from onnx import TensorProto, helper

    for first in ("batch", 2):  # whether runs are shared or not
        ends = [graphs.value(n, TensorProto.FLOAT, [first, "length"]) for n in "aby"]
        path = graphs.save(
            tmp_path / "m.onnx", [helper.make_node("Add", ["a", "b"], ["y"])], ends[:2], ends[2:], [], {}
        )
        model = runtime.ServedModel(path)
        with pytest.raises(runtime.RequestError, match=r"axis 'length' is 3 in 'a' and 1 in 'b', expected the same"):
            model.run(runtime.Request({"a": np.ones((2, 3), np.float32), "b": np.ones((2, 1), np.float32)}))
        got = model.run(runtime.Request({"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32)}))["y"]
        assert np.array_equal(got, np.full((2, 3), 2, np.float32))
    square = graphs.value("x", TensorProto.FLOAT, ["n", "n"]), graphs.value("y", TensorProto.FLOAT, ["n", "n"])
    nodes = [helper.make_node("MatMul", ["x", "x"], ["y"])]
    model = runtime.ServedModel(graphs.save(tmp_path / "s.onnx", nodes, [square[0]], [square[1]], [], {}))
    with pytest.raises(runtime.RequestError, match=r"axis 'n' is 2 in 'x' and 3 in 'x'"):
        model.run(runtime.Request({"x": np.ones((2, 3), np.float32)}))


@pytest.mark.parametrize("interface", [1, None])
def test_a_file_that_is_replaced_between_check_and_load_is_checked_again(
    runtime, graphs, folder, monkeypatch, interface
):
    import onnxruntime

    blocks, real = graphs.rotations("a1", "other"), onnxruntime.LoraAdapter
    model, path, loads = opened(runtime, folder), folder / "adapters/new.onnx_adapter", []
    graphs.write_adapter(path, blocks["a1"])

    class Late:
        def __new__(cls):
            if not loads:  # after the check, before the load
                graphs.write_adapter(path, blocks["other"], *([interface] if interface else []))
            loads.append(1)
            return real()

    monkeypatch.setattr(onnxruntime, "LoraAdapter", Late)
    if interface:
        with pytest.raises(runtime.ServingError, match="exported for another model"):
            model.run(runtime.Request({"x": x()}, choose("new")))
    else:
        got = model.run(runtime.Request({"x": x()}, choose("new")))["y"]
        assert np.abs(got - x() @ blocks["other"]).max() < 2e-6
        assert len(loads) == 2


def test_a_file_that_never_rests_is_refused(runtime, graphs, folder, monkeypatch):
    import onnxruntime

    blocks, real = graphs.rotations("a1")["a1"], onnxruntime.LoraAdapter

    def restless():
        graphs.write_adapter(folder / "adapters/new.onnx_adapter", blocks)
        return real()

    model = opened(runtime, folder)
    graphs.write_adapter(folder / "adapters/new.onnx_adapter", blocks)
    monkeypatch.setattr(onnxruntime, "LoraAdapter", restless)
    with pytest.raises(runtime.ServingError, match=r"^new.onnx_adapter changes while it is read"):
        model.run(runtime.Request({"x": x()}, choose("new")))


def test_an_adapter_whose_file_is_gone_is_dropped_when_another_is_loaded(runtime, graphs, folder):
    model = opened(runtime, folder)
    gone, stays = (weakref.ref(model._folder.get(name)) for name in ("a1", "a2"))
    (folder / "adapters/a1.onnx_adapter").unlink()
    graphs.write_adapter(folder / "adapters/new.onnx_adapter", graphs.rotations("new")["new"])
    model.run(runtime.Request({"x": x()}, choose("new")))
    gc.collect()
    assert gone() is None
    assert stays() is model._folder.get("a2")


@pytest.mark.parametrize("wrong", ["foreign", "damaged", "names", "shapes"])
def test_answers_name_the_adapter_and_no_directory(runtime, graphs, folder, wrong):
    model, path = opened(runtime, folder), folder / "adapters/new.onnx_adapter"
    blocks = graphs.rotations("a")["a"]
    if wrong == "damaged":
        path.write_bytes(graphs.write_adapter(path, blocks).read_bytes()[:-40])
    else:
        more = {"foreign": {"interface": 1}, "names": {"name": "b"}, "shapes": {}}[wrong]
        graphs.write_adapter(path, blocks[:, :3] if wrong == "shapes" else blocks, **more)
    with pytest.raises(runtime.ServingError, match=r"^new\.onnx_adapter") as caught:
        model.run(runtime.Request({"x": x()}, choose("new")))
    assert "/" not in str(caught.value)


def test_threads_with_different_adapters_do_not_disturb_each_other(runtime, graphs, folder):
    model, blocks = opened(runtime, folder), graphs.rotations("a1", "a2")
    worst, failures = [], []

    def work(name, seed):
        try:
            for i in range(50):
                got = model.run(runtime.Request({"x": x(seed=seed + i)}, choose(name)))["y"]
                worst.append(np.abs(got - x(seed=seed + i) @ (blocks[name] if name else np.eye(4))).max())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n, 100 * i)) for i, n in enumerate([None, "a1", "a2", "a1"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(worst) == 200
    assert max(worst) < 2e-6


def test_the_package_runs_without_oftfx_and_torch(runtime, folder):
    code = f"""
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('oftfx', 'torch'):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import importlib.util
spec = importlib.util.spec_from_file_location(
    'copied', {runtime.__file__!r}, submodule_search_locations=[{str(Path(runtime.__file__).parent)!r}]
)
copied = sys.modules['copied'] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(copied)
import numpy as np
model = copied.ServedModel({str(folder / "model.onnx")!r}, adapters={str(folder / "adapters")!r})
print(model.run(copied.Request({{'x': np.ones((1, 1, 4), np.float32)}}))['y'].tolist(), 'torch' in sys.modules)
try:
    model.run(copied.Request({{'x': np.ones((1, 1, 4), np.float32)}}, {{'adapter': 'b'}}))
except copied.RequestError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "[[[1.0, 1.0, 1.0, 1.0]]] False"
    assert "unknown adapter 'b'; there are: a1, a2" in done.stdout
