"""Ratios of times, on a clock that only the timed functions move."""

import pytest

from oftfx.evaluation import interleaved


class Clock:
    def __init__(self):
        self.now, self.calls = 0.0, []

    def perf_counter(self):
        return self.now

    def function(self, name, seconds):
        def run():
            self.calls.append(name)
            self.now += seconds(self.calls.count(name))

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(interleaved, "time", clock)
    return clock


def test_ratios_are_of_medians_after_a_round_that_does_not_count(clock):
    functions = {
        "a": clock.function("a", lambda n: {1: 100, 2: 1, 3: 2, 4: 9}[n]),  # median 2
        "b": clock.function("b", lambda n: {1: 0, 2: 3, 3: 5, 4: 4}[n]),  # median 4
    }
    done = []
    assert interleaved.ratios(functions, "a", rounds=3, report=done.append) == {"a": 1.0, "b": 2.0}
    assert done == list(range(1, 9))


def test_a_machine_that_becomes_slower_hits_all_alike(clock):
    slow = {n: clock.function(n, lambda k, s=s: s * 2**k) for n, s in {"a": 1.0, "b": 1.5, "c": 0.25}.items()}
    assert interleaved.ratios(slow, "b", rounds=5, report=lambda _: None) == pytest.approx(
        {"a": 1 / 1.5, "b": 1.0, "c": 0.25 / 1.5}
    )


def test_each_round_has_every_function_once_and_an_order_of_its_own(clock):
    names = "abcdefghi"
    functions = {n: clock.function(n, lambda _: 1.0) for n in names}
    interleaved.ratios(functions, "a", rounds=7, report=lambda _: None)
    rounds = ["".join(clock.calls[i : i + 9]) for i in range(0, 72, 9)]
    assert all(sorted(r) == sorted(names) for r in rounds)
    assert len(set(rounds)) == 8
    assert len({r[r.index("b") - 1] for r in rounds}) > 2  # what ran before it
