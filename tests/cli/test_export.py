import pytest

from tests.cli.command import run

pytestmark = pytest.mark.needs("typer", "rich", "transformers", "tokenizers")


@pytest.mark.needs("gguf")
def test_a_tokenizer_that_llama_cpp_does_not_know_is_named(files):
    done = run("gguf", files.base, files.out)
    assert done.status == 1
    assert "its model is WordLevel, and only BPE is known here" in done.err
    assert not files.out.exists()


def test_what_is_there_stays(files):
    files.out.write_text("mine")
    for command in ("export", "genai", "gguf", "openvino"):
        done = run(command, files.base, files.out)
        assert (done.status, "is there already" in done.err) == (1, True), done.err
    assert files.out.read_text() == "mine"
