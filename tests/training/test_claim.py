"""Two processes, and data that changed."""

import os
import subprocess
import sys

import pytest

from oftfx.errors import OftfxError
from oftfx.training.claim import DATA, check_data, claimed

HOLD = """
import sys
from pathlib import Path
from oftfx.training.claim import claimed
with claimed(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="nothing locks a directory there")
def test_another_process_is_told_and_a_killed_one_lets_go(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(OftfxError, match="another process trains there now"), claimed(out):
            pass
        other.kill()
    with claimed(out), pytest.raises(OftfxError, match="another process"), claimed(out):
        pass
    with claimed(out):
        pass
    assert not list(out.iterdir())


def test_data_that_changed_is_refused(tmp_path):
    data, held = tmp_path / "a.txt", tmp_path / "b.txt"
    data.write_text("one")
    held.write_text("two")
    (tmp_path / "run").mkdir()
    for _ in range(2):
        check_data(tmp_path / "run", {"data": data, "held_out": held})
    held.write_text("two!")
    with pytest.raises(OftfxError, match=r"b\.txt is not what this run was begun with \(held_out: sha256 3fc4ccfe7458"):
        check_data(tmp_path / "run", {"data": data, "held_out": held})
    (tmp_path / "run" / DATA).write_text("[1]")
    with pytest.raises(OftfxError, match="is damaged"):
        check_data(tmp_path / "run", {"data": data, "held_out": held})


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OftfxError, match="choose another directory"), claimed(tmp_path / "file"):
        pass
