"""Which operator is used, with a measurement that says what the test wants; no Triton and no GPU is needed."""

import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
import torch

import oftfx
from oftfx import OFT
from oftfx.errors import MissingExtraError, OftfxError, OftfxWarning
from oftfx.kernels import measure
from oftfx.rotation.rotate import _in_torch, rotate, rotate_jointly
from oftfx.rotation.triton import choose


class Measured:
    """Stands for `is_faster`, and counts."""

    def __init__(self):
        self.calls, self.answer = [], True

    def __call__(self, device, in_torch, by_triton, on):
        self.calls.append(on)
        if in_torch is not None:  # it can be timed on what it is given
            measure.run(in_torch, [torch.ones(s, dtype=d, requires_grad=g) for s, d, g in on])
        return self.answer


@pytest.fixture
def measured(monkeypatch):
    found = Measured()
    for name, value in {"SETTING": "auto", "_CPU": True, "_DECIDED": {}, "_ALWAYS": {}, "is_faster": found}.items():
        monkeypatch.setattr(choose, name, value)
    monkeypatch.setattr(choose, "_THERE", True)
    return found


def asked(rows=6, groups=3, size=5, count=1, dtype=torch.float32, learns=False, **kwargs):
    x, blocks = torch.zeros(rows, groups * size, dtype=dtype, **kwargs), torch.zeros(groups, size, count * size)
    return choose.rotates(x, blocks.to(x.device).requires_grad_(learns), None)


def test_a_kind_is_measured_once_and_rows_count_to_a_power_of_two(measured):
    assert [asked(rows) for rows in (4, 5, 7, 4)] == [True] * 4
    assert len(measured.calls) == 1
    measured.answer = False
    others = [{"rows": 8}, {"groups": 4}, {"size": 4}, {"count": 2}, {"dtype": torch.bfloat16}, {"learns": True}]
    for i, other in enumerate(others):
        assert [asked(**other), asked(**other)] == [False] * 2
        assert len(measured.calls) == 2 + i
    assert asked(6)
    assert measured.calls[-1] == [((6, 15), torch.float32, False), ((3, 5, 5), torch.float32, True)]


@pytest.mark.parametrize("learns", [False, True])
def test_each_device_is_measured(learns, measured):
    assert asked(learns=learns)
    measured.answer = False
    assert not asked(learns=learns, device="meta")  # stands for another device
    assert asked(learns=learns)
    assert len(measured.calls) == 2
    skew = torch.zeros(3, 10, requires_grad=learns)
    assert [choose.makes_series(s, 5, 3, True, None) for s in (skew, skew.to("meta"), skew)] == [False] * 3
    assert len(measured.calls) == 4


def test_gradients_count_only_where_they_are_asked_for(measured):
    asked(learns=True)
    with torch.no_grad():
        asked(learns=True)
    asked()
    assert len(measured.calls) == 2


def test_under_autocast_its_dtype_is_measured(measured):
    measured.answer = False
    x, blocks = torch.randn(6, 15), torch.randn(3, 5, 10, requires_grad=True)
    for mode in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            rotate(x, blocks[:, :, :5])
            rotate_jointly(x, blocks)
    rotate(x.bfloat16(), blocks[:, :, :5])
    assert [on[0][1] for on in measured.calls] == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_blocks_are_not_cast_before_they_are_asked_of(measured):
    measured.answer = False
    y = rotate(torch.randn(6, 15).bfloat16(), torch.randn(3, 5, 5))
    assert y.dtype == torch.bfloat16
    assert [d for _, d, _ in measured.calls[0]] == [torch.bfloat16, torch.float32]


def test_a_series_is_a_kind_of_its_own(measured):
    for rows, size, double, single in [(3, 5, 3, True), (2, 5, 3, True), (3, 5, 3, False), (3, 5, 2, True)]:
        assert choose.makes_series(torch.zeros(rows, size * (size - 1) // 2), size, double, single, None)
    assert len(measured.calls) == 3
    assert not choose.makes_series(torch.zeros(3, 10), 5, 0, False, None)
    assert not choose.makes_series(torch.zeros(3, 33 * 16), 33, 3, True, None)
    assert not choose.makes_series(torch.zeros(3, 9), 5, 3, True, None)


def test_threads_wait_for_one_measurement(measured, monkeypatch):
    answers, together = [], threading.Barrier(8)
    slow = threading.Event()
    monkeypatch.setattr(choose, "is_faster", lambda *a: slow.wait(0.05) or measured(*a))

    def one():
        together.wait()
        answers.append(asked())

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 8
    assert len(measured.calls) == 1


def test_nothing_is_measured_while_a_graph_is_captured(measured, monkeypatch):
    monkeypatch.setattr(choose, "capturing", lambda: True)
    assert not asked()
    assert measured.calls == []
    monkeypatch.setattr(choose, "capturing", lambda: False)
    assert asked()
    monkeypatch.setattr(choose, "capturing", lambda: True)
    assert asked(7)


def test_deterministic_algorithms_are_torchs(measured):
    assert asked()
    torch.use_deterministic_algorithms(True)
    try:
        assert not asked()
        assert not asked(60)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(measured.calls) == 1


def test_what_records_transforms_or_wraps_tensors_is_left_to_torch(measured):
    from torch._subclasses.fake_tensor import FakeTensorMode

    blocks, x = torch.zeros(3, 5, 5), torch.zeros(4, 15)
    with FakeTensorMode():
        assert not asked()
    assert not choose.possible(torch.zeros(4, 15, device="meta"))
    assert not asked(dtype=torch.float64)
    torch.func.vmap(lambda row: row + choose.rotates(row, blocks, None))(x)
    torch.func.jvp(lambda x: x + choose.rotates(x, blocks, None), (x,), (x,))
    torch.jit.trace(lambda x: x + choose.rotates(torch.zeros(4, 15), blocks, None), x, check_trace=False)
    assert not choose.rotates(torch.zeros(4, 16), blocks, None)
    assert not choose.rotates(x, torch.zeros(3, 5, 5 * (choose.LARGEST_COUNT + 1)), None)
    assert measured.calls == []


def test_settings(measured, monkeypatch):
    monkeypatch.setattr(choose, "SETTING", "0")
    assert not asked()
    monkeypatch.setattr(choose, "SETTING", "1")
    assert asked()
    monkeypatch.setattr(choose, "_THERE", False)
    with pytest.raises(MissingExtraError, match=r"OFTFX_TRITON=1 needs the package 'triton'"):
        asked()
    monkeypatch.setattr(choose, "SETTING", "auto")
    assert not asked()
    monkeypatch.setattr(choose, "SETTING", "on")
    with pytest.raises(OftfxError, match="OFTFX_TRITON: got 'on', expected one of auto, 0, 1"):
        asked()
    assert measured.calls == []


def test_on_a_cpu_both_words_are_needed_and_triton_stays_unloaded():
    code = """
import importlib, os, sys, torch
from oftfx import OFT, Rotation
from oftfx.rotation.triton import choose
for os.environ["OFTFX_TRITON"], os.environ["TRITON_INTERPRET"] in (("1", ""), ("auto", "1"), ("1", "1")):
    importlib.reload(choose)
    print(choose.SETTING, choose.possible(torch.zeros(1)))
    if not choose.possible(torch.zeros(1)):
        Rotation(15, OFT(5))(torch.zeros(4, 15))
print("triton" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False", "auto", "False", "1", "True", "False"]


def test_what_fails_while_it_is_measured_is_not_used_and_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    seen = []

    def fails(*_):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))
        raise RuntimeError("no compiler")

    monkeypatch.setattr(measure, "_compare", fails)
    with torch.inference_mode(), torch.autocast("cpu"), pytest.warns(OftfxWarning, match="not used .*no compiler"):
        assert not measure.is_faster(torch.device("cpu"), torch.sin, torch.sin, [((3,), torch.float32, True)])
    assert seen == [(True, False, False)]


@pytest.mark.parametrize(("seconds", "faster"), [((1.0, 0.5), True), ((1.0, 0.99), False), ((0.5, 1.0), False)])
def test_the_best_time_counts_and_a_little_is_not_faster(seconds, faster, monkeypatch):
    turns = iter([(9.0, 0.0), *(tuple(s * f for s in seconds) for f in (3, 1, 2, 1, 1))])
    each = iter([t for turn in turns for t in turn])
    monkeypatch.setattr(measure, "_seconds", lambda *_: next(each))
    assert measure._compare(None, None, []) == faster


def test_what_is_timed_goes_backward_where_there_are_gradients():
    x, blocks = torch.randn(4, 6), torch.randn(3, 2, 2, requires_grad=True)
    (y,) = measure.run(rotate, [x, blocks.detach()])
    assert torch.equal(y, rotate(x, blocks))
    (of_blocks,) = measure.run(rotate, [x, blocks])
    assert of_blocks.shape == blocks.shape


def test_a_rotation_on_a_cpu_asks_nothing(monkeypatch):
    monkeypatch.setattr(choose, "rotates", None)
    monkeypatch.setattr(choose, "makes_series", None)
    oftfx.Rotation(15, OFT(5))(torch.zeros(4, 15))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_wrong_is_not_taken(dtype):
    operands = [torch.randn(40, 15).to(dtype).requires_grad_(), torch.randn(3, 5, 5, requires_grad=True)]
    right = torch_rotate = _in_torch

    def sums_in_another_order(x, blocks):
        return torch_rotate(x.float(), blocks.to(x.dtype).float()).to(x.dtype)

    def transposed(x, blocks):
        return torch_rotate(x, blocks.mT)

    def forward_only(x, blocks):
        return right(x, blocks).detach() + 0 * right(x, blocks)

    measure.check_rounding(right, sums_in_another_order, operands)
    for wrong in (transposed, forward_only, lambda x, blocks: right(x, blocks) / 0):
        with pytest.raises(OftfxError, match="its result is wrong here"):
            measure.check_rounding(right, wrong, operands)
