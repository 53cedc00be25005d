"""Triton and MLServer, really started on loopback from the directories that `write_repository` wrote."""

import json
import subprocess
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from tests.serving.servers import ROOT, Server, environment, free_ports

pytestmark = [pytest.mark.server, pytest.mark.needs("onnx", "onnxruntime", "onnxscript", "transformers")]

BOUND = 2e-6


def llama(seed, layers):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=131, num_hidden_layers=layers, max_position_embeddings=128, pad_token_id=0, **sizes)
    return LlamaForCausalLM(config).eval()


def tenants(seed, *names, layers=1):
    model = llama(seed, layers)
    for index, name in enumerate(names):
        if index:
            oftfx.add_adapter(model, name, {"all-linear": OFT(8, share_input=True)})
        else:
            model = oftfx.transform(model, {"all-linear": OFT(8, share_input=True)}, adapter=name)
        generator = torch.Generator().manual_seed(10 * seed + index)
        for parameter in oftfx.adapter_parameters(model, name):
            nn.init.normal_(parameter, std=0.1, generator=generator)
    oftfx.set_adapter(model, names[0])
    return model


def tokens(batch=2, length=7, seed=0):
    ids = np.random.default_rng(seed).integers(5, 131, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@dataclass
class Files:
    """What is served, exported once for both servers."""

    models: dict
    paths: dict
    adapters: dict

    def expected(self, key, name, inputs):
        """torch's own logits; `name` is an adapter's or None."""
        model = self.models[key]
        if key != "folded":
            oftfx.set_adapter(model, name)
        with torch.no_grad():
            return model(**{n: torch.from_numpy(a) for n, a in inputs.items()}).logits.double().numpy()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from tests.serving import graphs

    folder = tmp_path_factory.mktemp("files")
    models = {"first": tenants(1, "a1", "a2", layers=2), "second": tenants(2, "a1")}
    models["folded"] = oftfx.fold(models["first"], adapter="a1").model
    examples = {n: torch.from_numpy(a) for n, a in tokens(2, 5).items()}
    asked = {"first": "swappable", "second": "swappable", "mixed": "mixed", "folded": "fixed"}
    paths = {}
    for key, mode in asked.items():
        paths[key] = folder / f"{key}.onnx"
        model = models["first" if key == "mixed" else key]
        oftfx.export_onnx(model, paths[key], examples, adapters=mode, verify=False)
    models["mixed"] = models["first"]
    adapters = {}
    for key in ("first", "second"):
        for name in oftfx.adapters(models[key]):
            path = folder / f"{key}-{name}.onnx_adapter"
            oftfx.export_onnx_adapter(models[key], path, adapter=name)
            adapters[key, name] = path
    paths["types"] = graphs.types(folder / "types.onnx")
    return Files(models, paths, adapters)


@pytest.fixture(scope="module", params=["triton", "mlserver"])
def server(request, files, tmp_path_factory):
    environment(request.param)  # before anything is made
    http, grpc = free_ports()
    out = tmp_path_factory.mktemp(request.param) / "models"

    def write(key, name, **options):
        names = [n for k, n in files.adapters if k == key]
        return oftfx.serving.write_repository(
            files.paths[key],
            out,
            server=request.param,
            name=name,
            adapters={n: files.adapters[key, n] for n in names} or None,
            http_port=http,
            grpc_port=grpc,
            threads=1,
            max_queue_delay=0.01,
            **options,
        )

    write("first", "llama")
    write("second", "llama", version=2)
    write("mixed", "mixed")
    write("folded", "folded")
    with Server(request.param, write("types", "types"), http, grpc) as started:
        yield started


def choose(name):
    return None if name is None else {"adapter": name}


def distance(got, expected):
    return np.abs(got - expected).max()


@pytest.mark.parametrize("key", ["first", "mixed"])
def test_every_adapter_by_http_and_grpc(server, files, tmp_path, key):
    model = {"first": "llama", "mixed": "mixed"}[key]
    version = "1" if key == "first" else None
    asked = [
        (None, (2, 7)),
        ("a1", (2, 7)),
        ("a2", (2, 7)),
        (None, (2, 7)),
        ("a1", (1, 1)),
        ("a2", (3, 19)),
        ("", (8, 2)),
    ]
    calls = [(model, tokens(*shape), choose(name), version) for name, shape in asked]
    grpc = server.call(tmp_path / "calls", calls)
    assert grpc["live"] is grpc["ready"] is grpc["models"][model] is True
    results = []
    for (name, _), (_, inputs, parameters, _), by_grpc in zip(asked, calls, grpc["calls"], strict=True):
        by_http = server.infer(model, inputs, parameters, version)
        assert (by_http.status, by_grpc["error"]) == (200, None)
        expected = files.expected(key, name or None, inputs)
        for got in (by_http.outputs["logits"], by_grpc["outputs"]["logits"]):
            assert got.dtype == np.float32
            assert distance(got, expected) < BOUND
        results.append(expected)
    # The bound means something: the adapters are far apart.
    assert distance(results[0], results[1]) > 1000 * BOUND
    assert distance(results[1], results[2]) > 1000 * BOUND


def test_an_unknown_adapter_is_an_error_that_names_those_there_are(server, tmp_path):
    wrong = [
        ("llama", {"adapter": "a3"}, "1", ("unknown adapter 'a3'", "there are: a1, a2;")),
        ("llama", {"adapter": "../adapters/a1"}, "1", ("unknown adapter", "a1, a2")),
        ("llama", {"adapters": "a1"}, "1", ("parameter 'adapters' means nothing",)),
        ("llama", {"adapter": 1}, "1", ("parameter 'adapter' is 1",)),
        ("llama", {"adapter": "a2"}, "2", ("unknown adapter 'a2'", "there are: a1;")),
        ("mixed", {"adapter": "a3"}, None, ("unknown adapter 'a3'", "a1, a2")),
        ("folded", {"adapter": "a1"}, None, ("unknown adapter 'a1'", "no adapters to choose")),
    ]
    calls = [(model, tokens(), parameters, version) for model, parameters, version, _ in wrong]
    answers = server.call(tmp_path / "calls", calls)["calls"]
    for (model, inputs, parameters, version), (*_, words), by_grpc in zip(calls, wrong, answers, strict=True):
        by_http = server.infer(model, inputs, parameters, version)
        assert by_http.status == 400
        assert not by_http.outputs
        assert not by_grpc["outputs"]
        assert by_grpc["status"] == "StatusCode.INVALID_ARGUMENT"
        for word in words:
            assert word in by_http.error
            assert word in by_grpc["error"]
    two = server.infer("llama", tokens(), {"adapter": ["a1", "a2"]}, "1")
    assert two.status >= 400
    assert not two.outputs


def test_an_adapter_in_a_tensors_parameters(server, files):
    """It belongs to the request. Triton hands no tensor's parameters to its backends, so only MLServer can object."""
    tensors = [
        {"name": n, "datatype": "INT64", "shape": [1, 3], "data": a.tolist(), "parameters": {"adapter": "a1"}}
        for n, a in tokens(1, 3).items()
    ]
    answer = server.infer("llama", {}, version="1", inputs=tensors)
    if server.kind == "mlserver":
        assert answer.status == 400
        assert "belongs to the request" in answer.error
    else:
        assert distance(answer.outputs["logits"], files.expected("first", None, tokens(1, 3))) < BOUND


def test_versions_stand_side_by_side(server, files):
    for version, key in (("1", "first"), ("2", "second")):
        for name in (None, "a1"):
            answer = server.infer("llama", tokens(2, 4), choose(name), version)
            assert json.loads(answer.text)["model_version"] == version
            assert distance(answer.outputs["logits"], files.expected(key, name, tokens(2, 4))) < BOUND
    assert distance(files.expected("first", "a1", tokens()), files.expected("second", "a1", tokens())) > 0.01


def test_a_folded_model(server, files):
    answer = server.infer("folded", tokens(3, 5))
    assert distance(answer.outputs["logits"], files.expected("folded", None, tokens(3, 5))) < BOUND
    # What it computes is the adapter that was folded.
    assert distance(answer.outputs["logits"], files.expected("first", "a1", tokens(3, 5))) < 1e-5


def test_metadata_and_readiness(server, tmp_path):
    assert server.get("/v2/health/live")[0] == server.get("/v2/health/ready")[0] == 200
    assert "name" in json.loads(server.get("/v2")[1])
    assert server.get("/v2/models/llama/versions/1/ready")[0] == 200
    assert server.get("/v2/models/nothing")[0] in (400, 404)
    by_http = json.loads(server.get("/v2/models/llama/versions/1")[1])
    by_grpc = server.call(tmp_path / "calls", [("llama", tokens(), None, "1")])["metadata"]["llama"]
    for found in (by_http, by_grpc):
        inputs = {t["name"]: (t["datatype"], [int(n) for n in t["shape"]]) for t in found["inputs"]}
        assert inputs == {n: ("INT64", [-1, -1]) for n in ("input_ids", "attention_mask")}
        outputs = [(t["name"], t["datatype"], [int(n) for n in t["shape"]]) for t in found["outputs"]]
        assert outputs == [("logits", "FP32", [-1, -1, 131])]
    mixed = json.loads(server.get("/v2/models/mixed")[1])
    assert {t["name"] for t in mixed["inputs"]} == {"input_ids", "attention_mask"}  # the server chooses the row


def test_every_type_by_http_and_grpc(server, tmp_path):
    from tests.serving import graphs

    inputs = graphs.typed_inputs(2)
    if server.kind == "triton":
        inputs["rows"] = inputs["rows"].reshape(-1, 1)  # Triton has no tensor without axes but the batch
    (by_grpc,) = server.call(tmp_path / "calls", [("types", inputs, None, None)])["calls"]
    assert by_grpc["error"] is None
    half = inputs.pop("half") if server.kind == "triton" else None  # Triton takes it in binary only
    by_http = server.infer("types", inputs | ({} if half is None else {"half": half}))
    if half is not None:
        assert by_http.status == 400
        by_http.outputs = by_grpc["outputs"]
        inputs["half"] = half
    assert by_http.outputs, by_http.error
    for name, array in inputs.items():
        for got in (by_http.outputs, by_grpc["outputs"]):
            assert got[f"{name}_out"].tolist() == array.tolist(), name


def test_wrong_inputs_are_the_senders_fault(server):
    inputs = tokens(1, 3)
    assert server.infer("llama", {"input_ids": inputs["input_ids"]}, version="1").status == 400
    assert (
        server.infer("llama", {**inputs, "input_ids": inputs["input_ids"].astype(np.float32)}, version="1").status
        == 400
    )
    assert server.infer("llama", {**inputs, "input_ids": inputs["input_ids"][0]}, version="1").status == 400
    outside = server.infer("llama", {**inputs, "input_ids": np.full((1, 3), 10**6)}, version="1")
    assert outside.status == 400
    assert "ONNX Runtime refuses the inputs" in outside.error
    assert server.infer("llama", inputs, version="1").status == 200


@pytest.mark.parametrize("model", ["llama", "mixed"])
def test_four_threads_with_different_adapters(server, files, model):
    key = {"llama": "first", "mixed": "mixed"}[model]
    version = {"llama": "1", "mixed": None}[model]
    asked = [
        [(name, (1 + i % 3, 6 if i % 2 else 9), 10 * t + i) for i in range(12)]
        for t, name in enumerate([None, "a1", "a2", "a1"])
    ]
    expected = {one: files.expected(key, one[0], tokens(*one[1], one[2])) for thread in asked for one in thread}
    errors, failures = [], []

    def work(thread):
        try:
            for one in thread:
                answer = server.infer(model, tokens(*one[1], one[2]), choose(one[0]), version)
                errors.append(distance(answer.outputs["logits"], expected[one]))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(t,)) for t in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(errors) == 48
    assert max(errors) < BOUND


def small(kind, server, folder, **options):
    """A directory with a node-by-node model of the adapters a1 and a2, and their blocks."""
    from tests.serving import graphs

    blocks, adapters = graphs.rotations("a1", "a2"), None
    path = graphs.mixed(folder / "m.onnx", blocks)
    if kind == "swappable":
        path = graphs.swappable(folder / "m.onnx")
        adapters = {n: graphs.write_adapter(folder / f"{n}.onnx_adapter", b) for n, b in blocks.items()}
    out = folder / "models"
    return oftfx.serving.write_repository(path, out, server=server, adapters=adapters, threads=1, **options), blocks


def six_at_once(kind, rows, folder, **options):
    """Six requests in six threads, of as many rows as ``rows`` says, to Triton; its statistics, once all are right."""
    environment("triton")
    http, grpc = free_ports()
    written, blocks = small(kind, "triton", folder, http_port=http, grpc_port=grpc, max_queue_delay=2.0, **options)
    answers = {}

    def work(index):
        x = np.random.default_rng(index).standard_normal((rows(index), 2, 4)).astype(np.float32)
        name = [None, "a1", "a2"][index % 3]
        answers[index] = server.infer("m", {"x": x}, choose(name)), x.astype(np.float64) @ blocks.get(name, np.eye(4))

    with Server("triton", written, http, grpc) as server:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for _ in range(100):  # a request is counted a little after it was answered
            (found,) = json.loads(server.get("/v2/models/m/stats")[1])["model_stats"]
            if found["inference_stats"]["success"]["count"] == 6:
                break
            time.sleep(0.05)
    assert len(answers) == 6
    for answer, expected in answers.values():
        assert distance(answer.outputs["y"], expected) < BOUND
    return found


@pytest.mark.parametrize("kind", ["swappable", "mixed"])
def test_triton_puts_requests_together_and_each_row_gets_its_adapter(kind, tmp_path):
    found = six_at_once(kind, lambda _: 1, tmp_path, preferred_batch_sizes=(6,), max_batch_size=6)
    assert found["inference_count"] == 6
    assert found["execution_count"] < 6


def inside_mlserver(script, written):
    """What a script of this folder prints as JSON, run by MLServer's own Python on a model directory."""
    command = [environment("mlserver") / "bin/python", ROOT / "tests/serving" / script, written.model]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["swappable", "mixed"])
def test_mlserver_puts_requests_together(kind, tmp_path):
    written, blocks = small(kind, "mlserver", tmp_path, max_batch_size=6, max_queue_delay=0.05)
    for name, array in blocks.items():
        np.save(written.model / f"{name}.npy", array)
    found = inside_mlserver("together.py", written)
    assert found["error"] < BOUND
    *runs, last = found["runs"]
    assert sum(sum(rows) for rows in runs) == 18
    # Requests of one and of two rows, in turn: 1 2 1 2, and a fifth and sixth would be more than six rows.
    assert runs == [[1, 2, 1, 2], [1, 2, 1, 2], [1, 2, 1, 2]]
    assert last == [2]


def test_triton_shares_no_run_at_one_row(tmp_path):
    """Requests of one to three rows at once; each is answered, and by itself."""
    found = six_at_once("mixed", lambda index: 1 + index % 3, tmp_path, max_batch_size=1)
    assert found["execution_count"] == 6


def test_mlserver_shares_no_run_at_one_row(tmp_path):
    written, blocks = small("mixed", "mlserver", tmp_path, max_batch_size=1, max_queue_delay=0.05)
    for name, array in blocks.items():
        np.save(written.model / f"{name}.npy", array)
    found = inside_mlserver("together.py", written)
    assert found["error"] < BOUND
    # Of the client that goes away nothing is run.
    assert [rows for rows in found["runs"] if rows] == [[1], [2]] * 6 + [[2]]


def test_mlserver_unloads_after_the_last_answer_and_loads_what_is_there(tmp_path):
    written, _ = small("mixed", "mlserver", tmp_path, max_batch_size=3)
    found = inside_mlserver("lifecycle.py", written)
    assert found["before"] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    for late in (found["during"], found["after"]):
        assert late == "ModelNotFound: Model m with version 1 not found"
    # A file that fails, mended, changed. The modules of `unloading` and of the last two stay, the failed one does not.
    assert found["loads"] == ["half", 0, 1]
    assert found["modules"] == 3


def test_an_adapter_is_added_and_removed_while_the_server_runs(server, files):
    folder = server.repository.path / "llama/1/adapters"
    source = files.adapters["first", "a2"].read_bytes()
    assert server.infer("llama", tokens(), choose("new"), "1").status == 400
    (folder / "new.part").write_bytes(source)
    (folder / "new.part").rename(folder / "new.onnx_adapter")
    answer = server.infer("llama", tokens(), choose("new"), "1")
    assert distance(answer.outputs["logits"], files.expected("first", "a2", tokens())) < BOUND
    (folder / "new.part").write_bytes(files.adapters["second", "a1"].read_bytes()[:-40])
    (folder / "new.part").rename(folder / "new.onnx_adapter")
    broken = server.infer("llama", tokens(), choose("new"), "1")
    assert broken.status == 500
    assert "new.onnx_adapter" in broken.error
    assert str(folder) not in broken.error
    (folder / "new.onnx_adapter").unlink()
    assert "there are: a1, a2;" in server.infer("llama", tokens(), choose("new"), "1").error


@pytest.mark.parametrize("kind", ["triton", "mlserver"])
def test_stopping_leaves_no_process_and_no_port(kind, tmp_path):
    from tests.serving import graphs

    environment(kind)
    http, grpc = free_ports()
    path = graphs.swappable(tmp_path / "m.onnx")
    adapters = {n: graphs.write_adapter(tmp_path / f"{n}.onnx_adapter", b) for n, b in graphs.rotations("a").items()}
    written = oftfx.serving.write_repository(
        path, tmp_path / "models", server=kind, adapters=adapters, http_port=http, grpc_port=grpc, threads=1
    )
    started = Server(kind, written, http, grpc)
    with started:
        answer_and_stop(started)
    with pytest.raises(OSError, match="refused"):
        started.get("/v2/health/live")


def answer_and_stop(started):
    from tests.serving import graphs

    x, blocks = np.ones((1, 1, 4), np.float32), graphs.rotations("a")["a"]
    got = started.infer("m", {"x": x}, {"adapter": "a"}).outputs["y"]
    assert distance(got, x @ blocks) < BOUND
    # Triton runs the model in a process of its own.
    assert len(started.processes()) == {"triton": 2, "mlserver": 1}[started.kind]
    started.process.terminate()
    assert started.process.wait(60) in (0, -15)
    assert started.processes() == []


@pytest.mark.parametrize("kind", ["triton", "mlserver"])
def test_a_foreign_adapter_in_the_directory_stops_the_load(kind, tmp_path):
    """Put there behind `write_repository`, which refuses it."""
    from tests.serving import graphs

    environment(kind)
    http, grpc = free_ports()
    path = graphs.swappable(tmp_path / "m.onnx")
    written = oftfx.serving.write_repository(
        path, tmp_path / "models", server=kind, http_port=http, grpc_port=grpc, threads=1
    )
    graphs.write_adapter(written.model / "adapters/b.onnx_adapter", graphs.rotations("b")["b"], interface=1)
    started = Server(kind, written, http, grpc).start(wait=False)
    try:
        assert started.process.wait(60) != 0 if kind == "triton" else not_ready(started)
    finally:
        started.stop()
    assert "b.onnx_adapter was exported for another model" in started.log.read_text()


def not_ready(started):
    """MLServer listens before it loads, and ends by itself when no model could be loaded: never ready, or gone."""
    for _ in range(600):
        if started.process.poll() is not None:
            return True
        try:
            status = started.get("/v2/models/m/ready")[0]
        except OSError:  # not listening yet, or no longer
            status = None
        if status is not None and "was exported for another model" in started.log.read_text():
            return status != 200
        time.sleep(0.1)
    return False


@pytest.mark.needs("typer", "tokenizers")
def test_verify_tells_a_right_adapter_from_a_wrong_one_and_from_none(server, files, tmp_path):
    """``oftfx verify`` against the running server."""
    from tests.cli.command import run
    from tests.cli.conftest import make_tokenizer

    base = llama(1, 2)
    base.save_pretrained(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    for name in ("a1", "a2"):
        oftfx.save_adapter(files.models["first"], tmp_path / name, adapter=name)

    def verify(model, adapter, *more):
        said = ["--base", tmp_path / "base", "--adapter", tmp_path / adapter, "--model", model]
        said += ["--prompt", "w1 w5 w9 w40", "--prompt", "w77", "--tokens", "12", "--quiet"]
        return run("verify", server.url, *said, *more)

    assert verify("folded", "a1").status == 0
    for name in ("a1", "a2"):
        done = verify("mixed", name, "--served-adapter", name)
        assert (done.status, "equal: " in done.out) == (0, True), done.out
    wrong = verify("mixed", "a1", "--served-adapter", "a2")
    assert (wrong.status, "different: " in wrong.out) == (3, True)
    lost = verify("mixed", "a1")
    assert (lost.status, "the adapter is not there" in lost.out) == (3, True)
    unknown = verify("mixed", "a1", "--served-adapter", "a3")
    assert (unknown.status, "unknown adapter 'a3'" in unknown.err) == (1, True)
    several = run("verify", server.url, "--base", tmp_path / "base", "--quiet")
    assert "name one: --model" in several.err
