"""Sets of files land whole: a full disk, a refused rename and a killed process at every step that writes."""

import errno
import os
import subprocess
import sys
import threading

import pytest

from oftfx import files
from oftfx.errors import AdapterFileError, FoldError, OftfxError, OftfxWarning
from oftfx.files import finish_landing, landing, of_output, of_version, remains, said, write, write_whole, written_by

OLD = {"head.json": b"old head", "weights": b"old weights" * 9, "stale": b"of the old layout", "README.md": b"a user's"}
NEW = {"head.json": b"the new head", "weights": b"the new weights" * 7, "more": b"more"}
AFTER = {**NEW, "README.md": OLD["README.md"]}


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}


@pytest.fixture
def old(tmp_path):
    for name, data in OLD.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def save(directory):
    with landing(directory, "head.json", AdapterFileError, stale=["stale", "weights", "head.json"]) as made:
        for name, data in NEW.items():
            write(made / name, data)


class Steps:
    """Everything that `oftfx.files` asks of the disk, counted; at one step `stop` is called instead."""

    def __init__(self, monkeypatch, stop):
        self.stop, self.count, self.at = stop, 0, None
        for name in ("put", "rename", "sync"):
            monkeypatch.setattr(files, name, self.counted(name, getattr(files, name)))

    def counted(self, name, function):
        def call(*args):
            if name == "put":
                # A disk is full, or a process killed, after any number of bytes.
                file, data = args
                for cut in (0, 1, len(data) // 2, len(data) - 1):
                    self.step(lambda cut=cut: function(file, data[:cut]))
            else:
                self.step(lambda: None)
            return function(*args)

        return call

    def step(self, before):
        if self.count == self.at:
            before()
            self.count += 1
            self.stop()
        self.count += 1


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")


def interrupt():
    raise KeyboardInterrupt


def test_a_set_replaces_its_names_and_nothing_else(old):
    save(old)
    assert contents(old) == AFTER
    assert sorted(p.name for p in old.iterdir()) == sorted(AFTER)


def test_a_full_disk_at_every_step_leaves_what_was_there(old, monkeypatch):
    steps = Steps(monkeypatch, full)
    save(old)  # how many steps there are
    assert contents(old) == AFTER
    total = steps.count
    assert total > 20
    for at in range(total):
        for name, data in OLD.items():
            (old / name).write_bytes(data)
        (old / "more").unlink(missing_ok=True)
        steps.count, steps.at = 0, at
        with pytest.raises(AdapterFileError, match="No space left on device.*make room there"):
            save(old)
        assert contents(old) == OLD, at
        assert sorted(p.name for p in old.iterdir()) == sorted(OLD), at
    steps.at = None
    save(old)
    assert contents(old) == AFTER


def test_an_interruption_at_every_step_leaves_what_was_there(old, monkeypatch):
    steps = Steps(monkeypatch, interrupt)
    steps.at = 0
    while True:
        steps.count = 0
        try:
            save(old)
        except KeyboardInterrupt:
            assert contents(old) == OLD, steps.at
            assert sorted(p.name for p in old.iterdir()) == sorted(OLD), steps.at
            steps.at += 1
            continue
        break
    assert contents(old) == AFTER


@pytest.mark.parametrize("stop", [full, interrupt])
def test_a_single_file_is_the_old_or_the_new_one_whatever_fails(stop, tmp_path, monkeypatch):
    place = tmp_path / "head.json"
    steps = Steps(monkeypatch, stop)
    write_whole(place, b"the first one")
    total, seen = steps.count, []
    for at in range(total):
        place.write_bytes(b"the old one")
        steps.count, steps.at = 0, at
        with pytest.raises((AdapterFileError, KeyboardInterrupt)) as caught:
            write_whole(place, b"the new one", AdapterFileError)
        found = place.read_bytes()
        assert found in (b"the old one", b"the new one"), at
        assert [p.name for p in tmp_path.iterdir()] == ["head.json"], at
        if stop is full:
            says_old = "What was there is as it was" in str(caught.value)
            says_new = "is the new file, but the disk did not confirm its name: No space" in str(caught.value)
            assert (says_old, says_new) == (found == b"the old one", found == b"the new one"), at
        seen.append(found)
    assert set(seen) == {b"the old one", b"the new one"}
    assert seen[-1] == b"the new one"  # the fsync after the rename


KILLED = """
import os, sys
from pathlib import Path
import pytest
from tests.test_files import Steps, save
steps = Steps(pytest.MonkeyPatch(), lambda: os._exit(9))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    if os.fork() == 0:
        steps.at = int(folder.name)
        save(folder)
        os._exit(0)
    os.wait()
"""


def test_a_process_killed_at_every_step_leaves_no_mixture(tmp_path):
    for at in range(60):
        (tmp_path / str(at)).mkdir()
        for name, data in OLD.items():
            (tmp_path / str(at) / name).write_bytes(data)
    subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=True, timeout=300)
    seen = set()
    for folder in sorted(tmp_path.iterdir(), key=lambda p: int(p.name)):
        found = contents(folder)
        head = found.get("head.json")
        advice = remains(folder, "head.json")
        assert found["README.md"] == OLD["README.md"]
        if head == OLD["head.json"]:
            assert found == OLD, folder.name
            seen.add("old")
        elif head == NEW["head.json"]:
            assert found == AFTER, folder.name
            seen.add("new")
        else:
            assert head is None
            assert "a save was killed while its files took their places: save again, or move all that is in" in advice
            seen.add("none")
            (hidden,) = folder.glob(".oftfx-*")
            if int(folder.name) % 2:  # what the message says
                for path in (hidden / "new").iterdir():
                    path.rename(folder / path.name)
                assert {**contents(folder), "stale": b""} == {**AFTER, "stale": b""}
            else:  # or what every reader does first
                before = contents(folder)
                with pytest.warns(OftfxWarning, match="a save was killed while its files took their places; they are"):
                    assert finish_landing(folder, "other.json", "head.json")
                assert contents(folder) == AFTER, before
                assert not [*folder.glob(".oftfx-*")]
            assert not finish_landing(folder, "head.json")
        assert head is None or not advice
        save(folder)
        assert contents(folder) == AFTER
        assert sorted(p.name for p in folder.iterdir()) == sorted(AFTER), "remains of the killed process are there"
    assert seen == {"old", "new", "none"}


def test_remains_of_a_killed_save_survive_a_save_that_fails(old, monkeypatch):
    """They may hold the only whole set."""
    hidden = old / ".oftfx-head.json-a1b2c3d4"
    (hidden / "old").mkdir(parents=True)
    (old / "head.json").rename(hidden / "old" / "head.json")
    (old / ".oftfx-head.json-00000000" / "new").mkdir(parents=True)  # killed before anything was moved
    steps = Steps(monkeypatch, full)
    steps.at = 3
    with pytest.raises(AdapterFileError):
        save(old)
    assert [p.name for p in old.glob(".oftfx-*")] == [hidden.name]
    assert (hidden / "old" / "head.json").read_bytes() == OLD["head.json"]
    steps.at = None
    save(old)
    assert sorted(p.name for p in old.iterdir()) == sorted(AFTER)


def test_what_cannot_be_put_back_is_kept_aside(old, monkeypatch):
    real = files.rename
    calls = []

    def rename(source, target):
        calls.append(target)
        if len(calls) > 2:
            full()
        real(source, target)

    monkeypatch.setattr(files, "rename", rename)
    with pytest.raises(AdapterFileError):
        save(old)
    (hidden,) = old.glob(".oftfx-*")
    kept = {**contents(old), **contents(hidden / "old")}
    assert kept == OLD


def test_two_that_save_at_once_leave_one_whole_set(tmp_path):
    def run(letter):
        for _ in range(20):
            with landing(tmp_path, "head", OftfxError) as made:
                write(made / "head", letter)
                write(made / "weights", letter)

    threads = [threading.Thread(target=run, args=(letter,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = contents(tmp_path)
    assert set(found) == {"head", "weights"}
    assert found["head"] == found["weights"]
    assert len(list(tmp_path.iterdir())) == 2


def test_remains_of_a_process_that_lives_are_left_alone(tmp_path):
    with landing(tmp_path, "head", OftfxError) as first:
        write(first / "head", b"slow")
        write_whole(tmp_path / "head", b"quick")
        assert first.is_dir()
    assert contents(tmp_path) == {"head": b"slow"}


def test_messages_name_the_place_and_what_to_do(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(FoldError, match=r"file/sub: cannot be written to: .*a file is where a directory is wanted"):
        write_whole(tmp_path / "file" / "sub" / "a", b"", FoldError)
    (tmp_path / "a").mkdir()
    with pytest.raises(FoldError, match=r"\(a\); a directory is where a file is wanted"):
        write_whole(tmp_path / "a", b"", FoldError)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "file"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_read_only_directory(old, monkeypatch, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code), str(old))

    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)  # root may write in a directory that is read-only by mode
    with pytest.raises(AdapterFileError, match=f"{os.strerror(code)}.*choose a place that can be written to"):
        save(old)
    assert contents(old) == OLD


def test_libraries_that_do_not_raise_the_errors_of_the_system(old):
    """What safetensors and tokenizers, ONNX Runtime and OpenVINO raise on a full disk."""
    rust = r"cannot be written to: No space left on device; make room there\. What was there is as it was"
    with pytest.raises(FoldError, match=rust), landing(old, "head.json", FoldError) as made:
        write(made / "weights", b"")
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    reason = r"cannot be written to: It failed, with [\d,]+ bytes free there \(weights\); make room there, or choose"
    place = old / "weights"
    with pytest.raises(FoldError, match=reason), landing(old, "head.json", FoldError), written_by("It", place):
        raise RuntimeError("basic_ios::clear: iostream error")
    with pytest.raises(ValueError, match="another thing"), landing(old, "head.json", FoldError):
        raise ValueError("another thing")
    assert contents(old) == OLD


def test_a_set_inside_another_is_told_by_the_place_that_is_seen(old, monkeypatch):
    with pytest.raises(FoldError) as caught, landing(old, "head.json", FoldError) as made:
        Steps(monkeypatch, full).at = 2
        write_whole(made / "weights", b"x", FoldError)
    assert str(caught.value).startswith(f"{old}: cannot be written to: No space left on device")
    assert contents(old) == OLD


def test_a_directory_made_for_nothing_is_gone(tmp_path, monkeypatch):
    Steps(monkeypatch, full).at = 0
    with pytest.raises(OftfxError, match="make room there"):
        write_whole(tmp_path / "a" / "b" / "file", b"x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "text", "output"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "standard output: cannot be written to or read: No space left on device; make room there",
            True,
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "/a/b"),
            "/a/b: cannot be written to or read: Read-only file system; choose a place that can be written to",
            False,
        ),
        (OSError("no file named config.json in base"), "no file named config.json in base", False),
        (OSError(errno.ECONNREFUSED, "Connection refused"), "[Errno 111] Connection refused", False),
    ],
)
def test_errors_of_the_system_are_told_by_what_they_name(error, text, output):
    """Libraries raise them with words alone, and sockets have no file: standard output is blamed for neither."""
    assert (said(error), of_output(error)) == (text, output)


def test_versions_are_named():
    assert of_version(3, 2) == "version 3; this oftfx reads version 2. A newer oftfx wrote it: install that"
    assert of_version(1, 2) == "version 1; this oftfx reads version 2. An older one wrote it: make it again with this"
