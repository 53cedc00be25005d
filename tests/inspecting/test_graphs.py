"""What is said of an ONNX file, also of one that its writer got wrong."""

import json

import pytest

from oftfx.inspecting.graphs import inspect_graph

pytestmark = pytest.mark.needs("onnx")


def test_words_that_are_no_text(tmp_path):
    """The protocol buffers' reader gives bytes for them, which are no keys of JSON. Found by tools/fuzz."""
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, "batch"]) for n in ("input", "output")]
    graph = helper.make_graph([helper.make_node("Identity", ["input"], ["output"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, producer_name="somebody")
    model.metadata_props.add(key="oftfx.interface", value="4711")
    data = model.SerializeToString()
    for word in (b"Identity", b"somebody", b"4711", b"batch", b"output"):
        assert word in data
        data = data.replace(word, word[:-1] + b"\x8d")
    path = tmp_path / "odd.onnx"
    path.write_bytes(data)
    found = inspect_graph(path)
    assert found.facts["operators"] == {"Identit\\x8d": 1}
    said = json.loads(found.to_json())
    assert (said["interface"], said["made by"]) == ("471\\x8d", "somebod\\x8d")
    assert [row["name"] for row in said["rows"]] == ["input", "outpu\\x8d"]
    assert "Identit\\x8d" in str(found)
