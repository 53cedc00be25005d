"""How long functions take beside each other."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping


def ratios(
    functions: Mapping[str, Callable[[], object]],
    reference: str,
    *,
    rounds: int,
    report: Callable[[int], None],
) -> dict[str, float]:
    """Median time of each function as a ratio to that of ``reference``; see `timed`.

    Args:
        functions: by name.
        reference: one of the names; its ratio is 1.
        rounds: how often each is timed.
        report: called with the number of calls done after each.
    """
    medians = {name: statistics.median(t) for name, t in timed(functions, rounds=rounds, report=report).items()}
    return {name: median / medians[reference] for name, median in medians.items()}


def timed(
    functions: Mapping[str, Callable[[], object]], *, rounds: int, report: Callable[[int], None]
) -> dict[str, list[float]]:
    """Seconds of each function, a number a round.

    Every round calls each of them once, in an order of its own, so that whatever else the machine does hits all alike
    and none always runs in the cache that the same other one left behind. A round before the first is not counted.

    Args:
        functions: by name.
        rounds: how often each is timed.
        report: called with the number of calls done after each.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    order, done = list(functions), 0
    for index in range(rounds + 1):
        random.Random(index).shuffle(order)
        for name in order:
            start = time.perf_counter()
            functions[name]()
            if index:
                times[name].append(time.perf_counter() - start)
            done += 1
            report(done)
    return times
