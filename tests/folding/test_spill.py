import os
import sys

import pytest
import torch

from oftfx.errors import FoldError
from oftfx.folding import spill
from oftfx.folding.spill import Spill

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's own account")


def mapped(tensor):
    """The file that holds a tensor's memory, or nothing."""
    place = tensor.untyped_storage().data_ptr()
    with open("/proc/self/maps") as file:
        for line in file:
            begin, _, end = line.split()[0].partition("-")
            if int(begin, 16) <= place < int(end, 16):
                return line.partition("/")[2]
    return ""


def test_what_a_forward_made_stands_in_files(tmp_path, monkeypatch):
    monkeypatch.setattr(spill, "_SMALL", 1)
    frozen = torch.randn(7, 5)
    watch = Spill(tmp_path).watch()
    with torch.no_grad(), watch:
        hidden = frozen @ torch.randn(5, 33)
        rows, odd = hidden[2:], hidden.t()[:, ::2]  # views stay views
        half = hidden.to(torch.bfloat16)
        view = frozen[1:3]  # of what was there before, which stays where it is
        expected = [t.clone() for t in (hidden, rows, odd, half)]
        before = hidden._version
        watch.put_away()
        assert all(torch.equal(a, b) for a, b in zip((hidden, rows, odd, half), expected, strict=True))
        hidden[3] = 9.0
        assert bool((rows[1] == 9).all())
        assert bool((odd[:, 0] == expected[2][:, 0]).all())
    assert "hidden-" in mapped(hidden)
    assert "hidden-" in mapped(half)
    assert mapped(hidden) == mapped(rows) == mapped(odd)
    assert mapped(frozen) == mapped(view) == mapped(torch.zeros(3))
    assert hidden._version > before
    assert list(tmp_path.iterdir()) == []  # no file has a name


def test_memory_is_given_back(tmp_path):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    kept = Spill(tmp_path)
    watch = kept.watch()
    with torch.no_grad(), watch:
        one = torch.zeros(1) + torch.ones(1)
        big = torch.ones(1) * torch.rand(24, 2**20)
        full = resident()
        watch.put_away()
        assert resident() < full - big.nbytes * 3 // 4
        total = float(big.double().sum())  # from the file
        assert 0.49 < total / big.numel() < 0.51
        kept.forget()
        assert resident() < full - big.nbytes * 3 // 4
        assert float(big.double().sum()) == total
    assert mapped(one) == mapped(torch.zeros(3))  # too small for a file


def test_a_full_disk_says_so(tmp_path, monkeypatch):
    def full(handle, begin, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    watch = Spill(tmp_path).watch()
    with torch.no_grad(), watch:
        big = torch.ones(1) * torch.rand(2**15)
        with pytest.raises(FoldError, match="the disk is full, there is no room for hidden states"):
            watch.put_away()
        assert bool((big + 1 > 1).all())
    assert list(tmp_path.iterdir()) == []
