import pytest

from tests.cli.command import run
from tests.streaming.compare import assert_same

pytestmark = pytest.mark.needs("typer", "rich", "transformers", "tokenizers")


@pytest.mark.needs("bitsandbytes", "accelerate")
@pytest.mark.parametrize("way", [[], ["--in-memory"]])
def test_a_kept_base_comes_back_bit_for_bit(files, way):
    from oftfx.opened import open_model

    assert run("quantize", files.base, files.tmp / "nf4", "--to", "nf4").status == 0
    assert run("fold", files.tmp / "nf4", files.adapter, files.out, *way, "--quiet").status == 0
    done = run("unfold", files.out, files.tmp / "again")
    assert done.status == 0, done.err
    assert "without its 14 rotations" in done.out
    assert_same(files.tmp / "again", files.tmp / "nf4")
    assert "oftfx_rotations" not in (files.tmp / "again" / "config.json").read_text()
    open_model(files.tmp / "again")
    assert (files.tmp / "again" / "tokenizer.json").is_file()


def test_a_fold_that_changed_weights_is_refused(files):
    assert run("fold", files.base, files.adapter, files.out, "--quiet").status == 0
    done = run("unfold", files.out, files.tmp / "again")
    assert done.status == 1
    assert "was folded, like 13 more" in done.err
    assert not (files.tmp / "again").exists()


@pytest.mark.needs("bitsandbytes", "accelerate")
def test_weights_of_others_are_not_mixed_with_the_bases(files):
    assert run("quantize", files.base, files.tmp / "nf4", "--to", "nf4").status == 0
    assert run("fold", files.tmp / "nf4", files.adapter, files.out, "--quiet").status == 0
    before = sorted(p.name for p in files.base.iterdir())
    done = run("unfold", files.out, files.base, "--force")
    assert (done.status, "holds a checkpoint that FoldResult.save did not write" in done.err) == (1, True)
    assert sorted(p.name for p in files.base.iterdir()) == before
