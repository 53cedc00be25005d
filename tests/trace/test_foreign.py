"""What a model raises is a reason to record it otherwise; a bug of ours comes through."""

import types

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import OftfxError, TraceError, UnrecordableError
from oftfx.trace.foreign import foreign, is_bug
from oftfx.trace.record import record_best

X = torch.ones(3, 6)


class Doing(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.a, self.what = nn.Linear(6, 6), what

    def forward(self, x):
        return self.what(self.a(x))


def raise_key(x):
    raise KeyError("mouse")


# The last four raise in compiled code, which the recorder calls in the model's place.
THEIRS = {
    "KeyError: 'mouse'": raise_key,
    "AssertionError": lambda x: x.new_ones(()) if x.dim() == 7 else exec("assert False"),
    "TypeError: add": lambda x: torch.add(x, "mouse"),
    "IndexError": lambda x: x[7],
    "AttributeError": lambda x: x.mouse,
    "RuntimeError": lambda x: x @ torch.ones(7),
}


@pytest.mark.parametrize("said", THEIRS)
def test_an_error_of_the_model_is_a_reason(said):
    model = Doing(THEIRS[said])
    recording = record_best(model, (X,))
    assert recording.rung == "tree"
    assert f"fake values: {said}" in recording.reason
    assert f"real values: {said}" in recording.reason
    assert len(oftfx.plan(model, {"a": OFT(3)}, example_inputs=(X,))) == 1
    with pytest.raises(TraceError, match="cannot be recorded on fake tensors"):
        oftfx.graph(model, (X,))


def as_ours(function):
    """The function as if a module of ours had it."""
    return types.FunctionType(function.__code__, {**globals(), "__name__": "oftfx.trace.recorder"})


def test_an_error_of_ours_is_none(monkeypatch):
    model = Doing(torch.relu)
    monkeypatch.setattr("oftfx.trace.recorder.Recorder._emit", as_ours(lambda *_: {}["bug"]))
    for run in (record_best, oftfx.graph, lambda m, x: oftfx.plan(m, {"a": OFT(3)}, example_inputs=x)):
        with pytest.raises(KeyError, match="bug"):
            run(model, (X,))


def test_a_wrong_type_in_our_own_code_is_none_either(monkeypatch):
    monkeypatch.setattr("oftfx.trace.recorder.DATA_DEPENDENT", None)
    with pytest.raises(TypeError, match="NoneType"):
        record_best(Doing(torch.relu), (X,))


def raised(function, *args):
    try:
        function(*args)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_whose_error_it_is():
    ours = as_ours(lambda run, *args: run(*args))
    assert is_bug(raised(ours, int, "mouse"))  # compiled code has no frame of its own
    assert not is_bug(raised(ours, foreign, int, "mouse"))
    assert not is_bug(raised(ours, raise_key, X))
    assert not is_bug(raised(foreign, raise_key, X))
    assert is_bug(raised(foreign, as_ours(raise_key), X))
    assert not is_bug(raised(OFT, 0))
    assert isinstance(raised(OFT, 0), OftfxError)
    assert not is_bug(KeyError("never raised"))


def test_missing_inputs_end_the_search_whatever_the_words(monkeypatch):
    from oftfx.trace import record as module

    tried = []

    def fail(*_, fake, **__):
        tried.append(fake)
        raise (UnrecordableError if len(tried) == 1 else TraceError)("mouse")

    monkeypatch.setattr(module, "record", fail)
    assert record_best(nn.Linear(6, 6)).reason == "UnrecordableError: mouse"
    assert tried == [True]
    record_best(nn.Linear(6, 6))
    assert tried == [True, True, False]
    monkeypatch.undo()
    recording = record_best(nn.Linear(6, 6))
    assert recording.rung == "tree"
    assert "names no example inputs" in recording.reason
