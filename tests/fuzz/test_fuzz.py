"""Some hundred broken inputs a target, always the same; `tools/fuzz` goes on where these end."""

from __future__ import annotations

import random
import shutil

import pytest

from tests.fuzz.guard import Watch
from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS

RUNS = {"graphs": 60, "adapters": 120, "folds": 60, "examples": 150}


@pytest.fixture(scope="module")
def watch(tmp_path_factory):
    return Watch(tmp_path_factory.mktemp("fuzz") / "outside")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.needs(*t.needs)) for n, t in TARGETS.items()])
def test_broken_input_ends_in_a_result_or_in_an_error_of_ours(name, watch):
    target = TARGETS[name]
    scratch, room = watch.outside.with_name("seeds"), watch.outside.with_name("input")
    scratch.mkdir()
    try:
        seeds = list(target.seeds(scratch))
    finally:
        shutil.rmtree(scratch)
    rng = random.Random(16)
    tried = [*seeds, *(mutated(rng.choice(seeds), rng, target.words) for _ in range(RUNS.get(name, 200)))]

    def read(data):
        room.mkdir()
        try:
            target.read(data, room)
        finally:
            shutil.rmtree(room)

    for data in tried:
        found = watch.run(read, data)
        assert found is None, f"{found.kind}: {found.said}\n{data[:2000]!r}"
