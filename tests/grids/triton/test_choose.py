"""When Triton's loop over columns is taken, with a kernel that is played; no Triton and no GPU is needed."""

import subprocess
import sys
import types
from contextlib import nullcontext

import pytest
import torch

from oftfx.errors import MissingExtraError, OftfxError, OftfxWarning
from oftfx.grids import Grid, Partition, compensated
from oftfx.grids.compensate import _in_torch
from oftfx.grids.triton import choose
from tests.grids.triton.blocks import GRIDS, block


@pytest.fixture
def played(monkeypatch):
    """As on a GPU where nothing was set: what was measured, and the answer to give."""
    found = types.SimpleNamespace(calls=[], answer=True)

    def is_faster(device, first, second, on, check):
        found.calls.append(on)
        ((shape, dtype, _),) = on
        first(torch.randn(shape, dtype=dtype))  # it can be timed on what it is given
        return found.answer

    for name, value in {
        "SETTING": "auto",
        "_CPU": True,
        "_DECIDED": {},
        "is_faster": is_faster,
        "_THERE": True,
    }.items():
        monkeypatch.setattr(choose, name, value)
    return found


@pytest.fixture
def kernel(monkeypatch):
    """Stands for the module of the kernel; counts, and may be made wrong."""
    made = types.ModuleType("oftfx.grids.triton.columns")
    made.calls, made.change = 0, lambda codes, errors: (codes, errors)

    def rounded(grid, rest, *operands):
        made.calls += 1
        return made.change(*_in_torch(grid, rest.clone(), *operands))

    made.rounded = rounded
    monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setattr(sys.modules["oftfx.grids.triton"], "columns", made, raising=False)
    return made


def asked(kind="nf4", columns=20, rows=33):
    grid = GRIDS[kind]
    return choose.rounds(grid, torch.zeros(columns, rows), None if grid.symmetric else torch.zeros(1), _in_torch)


def test_a_kind_is_held_once_and_rows_count_to_a_power_of_two(played):
    assert [asked(rows=rows) for rows in (33, 63, 40)] == [True] * 3
    assert len(played.calls) == 1
    played.answer = False
    # A table of as many levels is no other kind.
    others = [{"rows": 64}, {"columns": 19}, *({"kind": k} for k in GRIDS if k not in ("nf4", "unsorted table"))]
    for i, other in enumerate(others):
        assert [asked(**other), asked(**other)] == [False] * 2
        assert len(played.calls) == 2 + i
    assert asked()


def test_settings(played, monkeypatch):
    torch.use_deterministic_algorithms(True)
    try:
        assert not asked()
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(choose, "SETTING", "0")
    assert not asked()
    monkeypatch.setattr(choose, "SETTING", "1")
    assert asked()
    monkeypatch.setattr(choose, "_THERE", False)
    with pytest.raises(MissingExtraError, match="OFTFX_TRITON=1 needs the package 'triton'"):
        asked()
    monkeypatch.setattr(choose, "SETTING", "auto")
    assert not asked()
    monkeypatch.setattr(choose, "SETTING", "on")
    with pytest.raises(OftfxError, match="OFTFX_TRITON: got 'on'"):
        asked()
    assert played.calls == []


def test_on_a_cpu_nothing_is_asked_and_triton_stays_unloaded():
    code = """
import sys, torch
from oftfx.grids import Grid, Integers, Partition, compensated
from oftfx.grids.triton import choose
choose.is_faster = None
compensated(Grid(Partition.tiles((4, 8), (1, 4)), Integers(-8, 7, 7.0)), torch.randn(4, 8), torch.eye(8))
print("triton" in sys.modules, choose._DECIDED)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "{}"]


def test_a_weight_is_rounded_by_what_was_chosen(played, kernel):
    weight, inputs = torch.randn(9, 70), torch.randn(200, 70)
    grid = Grid(Partition.tiles((9, 70), (1, 35)), GRIDS["nf4"].levels)
    found = []
    for played.answer, calls in ((False, 0), (True, 2)):
        choose._DECIDED.clear()
        found.append(compensated(grid, weight, inputs.T @ inputs).codes)
        assert kernel.calls == calls
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", GRIDS)
def test_numbers_that_it_is_held_against_have_all_codes(kind):
    grid = GRIDS[kind]
    codes, _ = _in_torch(grid, *choose.problem(grid, torch.randn(64, 200), not grid.symmetric))
    levels = 16 if isinstance(grid.levels, type(GRIDS["nf4"].levels)) else grid.levels.high - grid.levels.low + 1
    assert len(codes.unique()) > 0.9 * levels


def wrong_code(codes, errors):
    return codes + 1, errors


def wrong_in_some_rows(codes, errors):
    codes[3, :2] += 1
    return codes, errors


def wrong_errors(codes, errors):
    return codes, errors * 1.001


def no_number(codes, errors):
    return codes, errors / 0


def other_dtype(codes, errors):
    return codes.int(), errors


@pytest.mark.parametrize("change", [wrong_code, wrong_in_some_rows, wrong_errors, no_number, other_dtype])
def test_a_kernel_that_is_wrong_is_not_taken_and_said(change, kernel, monkeypatch):
    from oftfx.kernels import measure

    monkeypatch.setattr(choose, "SETTING", "auto")
    monkeypatch.setattr(choose, "_CPU", True)
    monkeypatch.setattr(choose, "_DECIDED", {})
    monkeypatch.setattr(choose, "_THERE", True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(measure, "_compare", lambda *_: True)
    assert asked()
    choose._DECIDED.clear()
    kernel.change = change
    with pytest.warns(OftfxWarning, match="not used .*its result is wrong here"):
        assert not asked()
    assert not asked()  # and once only


def test_one_row_may_differ_by_a_last_bit():
    grid = GRIDS["nf4"]
    operands = block(grid, 20, 33)

    def second(*_):
        codes, errors = _in_torch(grid, operands[0].clone(), *operands[1:])
        codes[5:, 2] += 1
        errors[5:, 2] += 1
        return codes, errors

    choose.check(lambda *_: _in_torch(grid, operands[0].clone(), *operands[1:]), second, [])
