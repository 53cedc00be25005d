"""The smallest inputs of what was found, each mended where it was read."""

import io
import json
import pickle
from contextlib import suppress
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import oftfx
from oftfx import OFT
from oftfx.adapter.checkpoints import check_pickled
from oftfx.adapter.folded import own_files, read_note
from oftfx.errors import AdapterFileError, FoldError, OftfxError
from oftfx.evaluation.served import InferenceServer, OpenAIServer, ServerError
from oftfx.files import is_name
from oftfx.inspecting.found import InspectError
from oftfx.inspecting.inspect import inspect
from oftfx.streaming.directory import CheckpointDirectory
from oftfx.training.progress import losses_so_far, resume, save_progress
from tests.adapter.conventions.models import net
from tests.fuzz.mutate import packed


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "a\\b", "a\0", "\ud800", "a" * 256, None, 3])
def test_no_way_to_another_directory_is_a_name(name):
    assert not is_name(name)
    assert is_name("model-00001-of-00002.safetensors")


@pytest.mark.parametrize("file", ["", "..", "../outside/model.safetensors", "/etc/passwd", "a" * 3000])
def test_an_index_that_leads_elsewhere(tmp_path, file):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(FoldError, match="files beside it"):
        CheckpointDirectory.read(tmp_path)
    with pytest.raises(AdapterFileError, match="no safetensors file beside it"):
        oftfx.adapter_convention(tmp_path)
    base = torch.nn.Sequential(torch.nn.Linear(6, 4))
    from oftfx.folding.reference import _files

    with pytest.raises(FoldError, match="files beside it"):
        _files(tmp_path)
    assert len(base) == 1


def test_a_save_replaces_no_file_elsewhere(tmp_path):
    note = {"files": ["a.safetensors", "..", "../b", "/etc/passwd", 3]}
    (tmp_path / "oftfx_fold.json").write_text(json.dumps(note))
    assert own_files(tmp_path) == ["a.safetensors"]
    (tmp_path / "oftfx_fold.json").write_text('{"files": 3}')
    assert own_files(tmp_path) == []


@pytest.mark.parametrize(
    "change",
    [
        {"facts": []}, {"facts": {"floats": 1}}, {"files": ["../a"]}, {"folds": [{}]}, {"folds": [{"module": "x"}]},
        {"report": {"sites": [{"fqn": 1}], "adapters": []}}, {"way": 1}, {"way": "other"}, {"rotations": 3},
    ],
)  # fmt: skip
def test_an_odd_note_of_a_fold(tmp_path, change):
    base = torch.nn.Sequential(torch.nn.Linear(6, 4))
    oftfx.fold(oftfx.transform(base, {"*": OFT(3, init="normal")})).save(tmp_path)
    assert read_note(tmp_path)["way"] == "state_dict"
    note = json.loads((tmp_path / "oftfx_fold.json").read_text()) | change
    (tmp_path / "oftfx_fold.json").write_text(json.dumps(note))
    with pytest.raises(AdapterFileError, match=r"oftfx_fold\.json"):
        oftfx.load_folded(tmp_path, torch.nn.Sequential(torch.nn.Linear(6, 4)))


def test_the_pickle_of_hqq_holds_tensors_only(tmp_path):
    torch.save({"layer": {"W_q": torch.zeros(3), "meta": {"nbits": 4, "shape": torch.Size([3])}}}, tmp_path / "a.pt")
    check_pickled(tmp_path / "a.pt")

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    torch.save({"layer": Bomb()}, tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Bomb()))
    for name in ("b.pt", "c.pt", "nothing.pt"):
        with pytest.raises(AdapterFileError, match="damaged, or a pickle that asks for more than tensors"):
            check_pickled(tmp_path / name)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "X"])
def test_weights_of_a_dtype_that_torch_hardly_knows(tmp_path, dtype):
    tensors = {"base_model.model.proj.oft_R.weight": (dtype, [2, 6], b"\0" * (6 if dtype == "F4" else 12))}
    (tmp_path / "adapter_model.safetensors").write_bytes(packed(tensors, None))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "OFT", "peft_version": "0.21.2"}')
    if dtype.startswith("F8"):
        assert oftfx.load_adapter(net(), tmp_path)(torch.zeros(1, 4, 6, 6)).isfinite().all()
        return
    with pytest.raises(OftfxError, match="adapter_model"):
        oftfx.load_adapter(net(), tmp_path)


def test_a_plan_beside_an_adapter_that_is_no_text(tmp_path):
    oftfx.save_adapter(oftfx.transform(net(), {"proj": OFT(4)}), tmp_path, convention="oftfx")
    for wrong in (b"\xff", b"[" * 100_000):
        (tmp_path / "oftfx_plan.json").write_bytes(wrong)
        with pytest.raises(AdapterFileError, match=r"oftfx_plan\.json"):
            oftfx.load_adapter(net(), tmp_path)


@pytest.mark.parametrize(
    "change", [{"step.0": None}, {"step.0": (33,)}, {"exp_avg.0": (7,)}, {"random": (3,)}, {"losses": ()}]
)
def test_progress_that_does_not_fit_changes_nothing(tmp_path, change):
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2, 3)
    optimizer.step()
    save_progress(tmp_path, [parameter], optimizer, [3.0])
    assert losses_so_far(tmp_path) == [3.0]
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "training.safetensors")
    for name, shape in change.items():
        kept = tensors.pop(name)
        if shape is not None:
            tensors[name] = torch.zeros(shape, dtype=kept.dtype)
    save_file(tensors, tmp_path / "training.safetensors")
    new = torch.nn.Parameter(torch.full((2, 3), 5.0))
    state = torch.get_rng_state()
    with pytest.raises(OftfxError, match=r"training\.safetensors"):
        resume(tmp_path, [new], torch.optim.AdamW([new]))
    assert torch.equal(new, torch.full((2, 3), 5.0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "text", [b"\xff", b"{", b"[]", b'{"held_out": {"before": {}}}', b'{"held_out": {"a": {"loss": "x"}}}']
)
def test_a_result_of_training_that_is_none(tmp_path, text):
    (tmp_path / "oftfx_train.toml").write_text('base = "a"\ndata = "b"')
    (tmp_path / "oftfx_training.json").write_bytes(text)
    with pytest.raises(OftfxError, match=r"oftfx_training\.json is damaged"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    "answer",
    [{}, [], 1, None,
    {"data": 1},
    {"data": [{"id": []}]},
    {"data": [{}], "choices": [{}]},
    {"outputs": [{"name": "logits"}]},

     {"outputs": [{"name": "logits", "data": [1.0], "shape": [1, 1, 1]}], "inputs": []},
     {"inputs": [{"name": "past_key_values.0", "shape": []}]}],
)  # fmt: skip
def test_a_server_that_answers_something_else(answer):
    body = json.dumps(answer).encode()
    with patch("urllib.request.urlopen", lambda *_, **__: io.BytesIO(body)):
        with pytest.raises(ServerError):
            OpenAIServer("http://h", "m", "", 1.0).tokens([1], 2)
        with pytest.raises(ServerError):
            InferenceServer("http://h", "m", "", 1.0).logits(torch.arange(3).view(1, 3))
        with pytest.raises(ServerError):
            OpenAIServer("http://h", "", "", 1.0)


@pytest.mark.needs("onnx", "onnxruntime")
@pytest.mark.parametrize(
    ("inputs", "parameters", "outputs"),
    [
        ("x", {}, None), ({"x": [[1], [1, 2]]}, {}, None), ({1: 2, "x": 1}, {}, None), ({"x": 1}, {5: "a"}, None),
        ({"x": np.ones((1, 1, 4), np.float32)}, {}, 1), ({"x": np.ones((1, 1, 4), np.float32)}, {}, [3]),
        ({"x": np.ones((1, 1, 4), np.float32)}, [], None), ({"x": np.ones((1, 1, 4), np.float32)}, {}, "y"),
    ],
)  # fmt: skip
def test_an_odd_request_is_told_so_and_the_next_is_answered(tmp_path, inputs, parameters, outputs):
    from oftfx.serving import Request, RequestError, ServedModel
    from tests.serving import graphs

    model = ServedModel(graphs.swappable(tmp_path / "model.onnx"), threads=1)
    right = Request({"x": np.ones((1, 1, 4), np.float32)})
    wrong, answer = model.run_all([Request(inputs, parameters, outputs), right])
    assert isinstance(wrong, RequestError)
    assert answer["y"].shape == (1, 1, 4)


@pytest.mark.needs("onnx", "onnxruntime")
def test_a_graph_with_names_that_are_no_text(tmp_path):
    from oftfx.serving import write_repository
    from tests.serving import graphs

    file = graphs.swappable(tmp_path / "model.onnx")
    for name in (b"length", b"swappable"):
        file.write_bytes(graphs.swappable(tmp_path / "model.onnx").read_bytes().replace(name, b"\xf5" * len(name)))
        with pytest.raises(OftfxError, match="damaged"):
            write_repository(file, tmp_path / "served", server="mlserver")
        with suppress(InspectError):
            assert str(inspect(file)).encode()
