"""Every command that writes, where there is no room and where nothing can be written: what was there stays."""

import itertools
import os
import re
import subprocess
import sys

import pytest

import oftfx
from oftfx import OFT
from tests.cli.command import run
from tests.cli.test_train import options
from tests.reference import randomize
from tests.small_disk import small_disk
from tests.streaming.compare import adapter_for

pytestmark = pytest.mark.needs("typer", "rich", "transformers", "tokenizers")


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as made:
        yield made


@pytest.fixture
def parts(files, disk, tiny_llama):
    """Two adapters, so that the second result is another, and ``out`` on the small disk."""
    files.disk, files.out = disk, disk.path / "out"
    files.other = adapter_for(tiny_llama(), files.tmp / "other", {"all-linear": OFT(8)})
    return files


def rotations(parts, model, seed=0, **spec):
    """An adapter that PEFT's convention can say."""
    made = randomize(oftfx.transform(model, {"all-linear": OFT(16, **spec)}), std=0.02, seed=seed)
    return oftfx.save_adapter(made, parts.tmp / f"adapter-{seed}")


def refused(done, place, advice):
    """One line that names the place and what to do, and the status of an error."""
    assert done.status == 1
    assert done.out == ""
    assert done.lines[-1].startswith("error: ")
    assert [line for line in done.lines if "error: " in line or str(place.parent) in line] == [done.lines[-1]]
    assert str(place.parent) in done.lines[-1]
    assert place.name in done.lines[-1]
    assert "/.oftfx-" not in done.lines[-1]
    assert advice in done.lines[-1].lower()


def holds(parts, first, again, place, leave):
    """The second command fails on a full and on a read-only disk, with the first one's result untouched."""
    done = run(*first)
    assert done.status == 0, done.err
    before = parts.disk.contents()
    for free in leave:
        with parts.disk.full(free):
            refused(run(*again), place, "make room")
        assert parts.disk.contents() == before, free
    with parts.disk.read_only():
        done = run(*again)
    refused(done, place, "choose a place that can be written to")
    assert not [line for line in done.lines if re.search(r": \d+/\d+", line)], "it is known before the work"
    assert parts.disk.contents() == before
    done = run(*again)
    assert done.status == 0, done.err
    assert parts.disk.contents() != before


FOLDS = {"by files": [], "in memory": ["--in-memory"]}


@pytest.mark.parametrize("way", FOLDS)
def test_a_fold(parts, way):
    first = ["fold", parts.base, parts.adapter, parts.out, *FOLDS[way]]
    again = ["fold", parts.base, parts.other, parts.out, *FOLDS[way], "--force", "--json"]
    holds(parts, first, again, parts.out, [0, 8192, 40960])


@pytest.mark.needs("bitsandbytes")
def test_a_quantized_model(parts):
    first = ["quantize", parts.base, parts.out, "--to", "nf4"]
    holds(parts, first, ["quantize", parts.base, parts.out, "--to", "fp4", "--force"], parts.out, [0, 8192, 40960])


@pytest.mark.needs("compressed_tensors")
def test_a_model_in_integers(parts):
    first = ["quantize", parts.base, parts.out, "--to", "int4"]
    holds(parts, first, ["quantize", parts.base, parts.out, "--to", "int8", "--force"], parts.out, [0, 8192, 40960])


@pytest.mark.needs("bitsandbytes")
def test_a_base_that_comes_back(parts):
    """In the place of the fold, and of nothing: what `unfold` wrote it does not know again."""
    nf4 = parts.tmp / "nf4"
    assert run("quantize", parts.base, nf4, "--to", "nf4").status == 0
    first = ["fold", nf4, parts.adapter, parts.out, "--in-memory"]
    holds(parts, first, ["unfold", parts.out, parts.out, "--force"], parts.out, [0, 8192, 40960])


@pytest.mark.parametrize("convention", ["peft", "oftfx", "oft_v2"])
def test_an_adapter_for_others(parts, tiny_llama, convention):
    one, two = (rotations(parts, tiny_llama(), seed) for seed in (1, 2))
    place = parts.out if convention != "oft_v2" else parts.out.with_suffix(".safetensors")
    first = ["convert", parts.base, one, place, "--to", convention]
    holds(parts, first, ["convert", parts.base, two, place, "--to", convention, "--force"], place, [0, 8192])


def test_a_blend(parts, tiny_llama):
    adapter = rotations(parts, tiny_llama(), parameterization="cayley")
    first = ["merge", parts.base, parts.out, "-a", adapter]
    again = ["merge", parts.base, parts.out, "-a", f"{adapter}=0.5", "--force", "--json"]
    holds(parts, first, again, parts.out, [0, 8192])


def test_the_nearest_lora(parts):
    more = ["--bound", 1, "--quiet", "--rank"]
    first = ["to-lora", parts.base, parts.adapter, parts.out, *more, 64]
    holds(parts, first, ["to-lora", parts.base, parts.other, parts.out, *more, 63, "--force"], parts.out, [0, 8192])


@pytest.mark.parametrize("name", ["page.html", "page.md", "figures"])
def test_a_report(parts, name):
    folded = {"one": parts.adapter, "two": parts.other}
    for made, adapter in folded.items():
        assert run("fold", parts.base, adapter, parts.tmp / made, "--quiet").status == 0
    place = parts.disk.path / name
    again = ["report", parts.tmp / "two", "--out", place, "--force"]
    holds(parts, ["report", parts.tmp / "one", "--out", place], again, place, [0])


def test_a_model_card(parts):
    assert run("fold", parts.base, parts.adapter, parts.out, "--quiet").status == 0
    again = ["card", parts.out, "--write", "--force", "--tag", "news"]
    holds(parts, ["card", parts.out, "--write", "--force"], again, parts.out / "README.md", [0])


def test_the_page_of_a_plan(parts):
    place = parts.disk.path / "plan.html"
    first = ["plan", parts.base, "--html", place]
    done = run(*first)
    assert done.status == 0
    before = parts.disk.contents()
    with parts.disk.read_only():
        refused(run(*first, "--force"), place, "choose a place that can be written to")
    with parts.disk.full():
        done = run(*first, "--force")
    assert done.status == 1
    assert "14 sites" in done.out  # the plan itself is not lost
    assert "(plan.html); make room there. What was there is as it was" in done.lines[-1]
    assert parts.disk.contents() == before


@pytest.mark.needs("onnx", "onnxruntime", "onnxscript")
def test_a_graph_and_its_adapter(parts, tiny_llama):
    one, two = (rotations(parts, tiny_llama(), seed) for seed in (1, 2))
    place = parts.disk.path / "model.onnx"
    first = ["export", parts.base, place, "--no-verify", "--adapter", one]
    again = ["export", parts.base, place, "--no-verify", "--adapter", two, "--force"]
    holds(parts, first, again, place, [81920])
    place = parts.disk.path / "one.onnx_adapter"
    again = ["export-adapter", parts.base, two, place, "--force"]
    holds(parts, ["export-adapter", parts.base, one, place], again, place, [0, 8192])


@pytest.mark.needs("onnx", "onnxruntime", "onnxscript")
def test_a_directory_for_genai(parts, tiny_llama):
    one, two = (rotations(parts, tiny_llama(), seed) for seed in (1, 2))
    first = ["genai", parts.base, parts.out, "--no-verify", "--adapter", one]
    again = ["genai", parts.base, parts.out, "--no-verify", "--adapter", two, "--force"]
    holds(parts, first, again, parts.out, [81920])


@pytest.mark.needs("openvino", "onnx", "onnxruntime", "onnxscript")
def test_a_directory_for_openvino(parts, tiny_llama):
    one, two = (rotations(parts, tiny_llama(), seed) for seed in (1, 2))
    first = ["openvino", parts.base, parts.out, "--no-verify", "--adapter", one]
    again = ["openvino", parts.base, parts.out, "--no-verify", "--adapter", two, "--force"]
    holds(parts, first, again, parts.out, [458752])


@pytest.mark.needs("gguf")
def test_a_file_for_llama_cpp(parts, tiny_llama):
    from tests.gguf.tokenizers import bytes_as_letters

    place, base = parts.disk.path / "model.gguf", parts.tmp / "letters"
    tiny_llama(vocab_size=340, attention_bias=False).save_pretrained(base)
    bytes_as_letters(340).save_pretrained(base)
    first = ["gguf", base, place, "--quiet"]
    holds(parts, first, ["gguf", base, place, "--quiet", "--quantized", "Q8_0", "--force"], place, [0, 81920])


@pytest.mark.needs("onnx", "onnxruntime")
@pytest.mark.parametrize("server", ["triton", "mlserver"])
def test_a_directory_of_a_server(parts, server):
    from tests.serving import graphs

    model = graphs.swappable(parts.tmp / "m.onnx")
    first = ["repository", model, parts.out, "--server", server]
    for name, blocks in graphs.rotations("a1").items():
        first += ["--adapter", f"{name}={graphs.write_adapter(parts.tmp / f'{name}.onnx_adapter', blocks)}"]
    holds(parts, first, [*first, "--version", 2], parts.out, [0, 8192])


def test_a_training_run_goes_on_once_there_is_room(parts):
    chosen = options(parts, steps=6, every=2)
    assert run("train", parts.tmp / "whole", *chosen, "--quiet").status == 0
    for free in (0, 4096):
        with parts.disk.full(free):
            refused(run("train", parts.out, *chosen, "--quiet"), parts.out, "make room")
    room = (parts.tmp / "whole" / "training.safetensors").stat().st_size
    with parts.disk.full(room * 3 // 2):  # for the first of the two that are there while one takes the other's place
        refused(run("train", parts.out, *chosen, "--quiet"), parts.out, "make room")
    progress = (parts.out / "training.safetensors").read_bytes()
    with parts.disk.read_only():
        refused(run("train", parts.out, *chosen, "--quiet"), parts.out, "choose a place that can be written to")
    assert (parts.out / "training.safetensors").read_bytes() == progress
    assert run("train", parts.out, *chosen, "--quiet").status == 0
    for file in ("training.safetensors", "oftfx_training.json", "adapter/adapter_model.safetensors"):
        assert (parts.out / file).read_bytes() == (parts.tmp / "whole" / file).read_bytes()
    assert not [name for name in parts.disk.contents() if ".oftfx-" in name]


def test_a_sample(parts, monkeypatch):
    from oftfx.demo import smollm, text
    from oftfx.opened import open_model, open_tokenizer

    monkeypatch.setattr(smollm, "load", lambda: (open_model(parts.base), open_tokenizer(parts.base)))
    count = itertools.count()
    monkeypatch.setattr(text, "read", lambda split: [f"{split} {next(count)}"])
    holds(parts, ["sample", parts.out], ["sample", parts.out, "--force"], parts.out, [0, 8192])


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("command", [["inspect", "ADAPTER"], ["--version"]])
def test_standard_output(files, command, buffered):
    """Python would fail once more, with another status, when it ends and empties what is buffered."""
    words = [str(files.adapter) if w == "ADAPTER" else w for w in command]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "oftfx", *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": buffered},
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: standard output: cannot be written to or read: No space left on device; make room there"
    )
    assert "Traceback" not in done.stderr
