"""Processes that calibrate one model together against one process that has all of their inputs."""

import warnings

import pytest
import torch
import torch.distributed as dist

import oftfx
from oftfx.errors import FoldError
from oftfx.folding.shown import Shown
from tests.ecosystem import calibrating, processes
from tests.quantized import weight
from tests.reference import rel

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.needs("bitsandbytes"),
]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Every job's result; the two processes are started once."""
    return processes.run(list(calibrating.JOBS), tmp_path_factory.mktemp("two"), 2, calibrating.__name__)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The same of three processes."""
    return processes.run(list(calibrating.THREE), tmp_path_factory.mktemp("three"), 3, calibrating.__name__)


def of(jobs, name):
    if isinstance(jobs[name], str):
        pytest.fail(jobs[name], pytrace=False)
    return jobs[name]


def alone(batches, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return oftfx.fold(calibrating.model(), **{"quantized": "calibrate", **options}, calibration=batches)


def check_like_one(got, batches, **options):
    """Same bits in all processes; the lines, errors and outputs of one process."""
    assert got["same"]
    assert got["same report"]
    wanted = alone(batches, **options)
    assert [s.fqn for s in got["report"]] == [s.fqn for s in wanted.report]
    for mine, its in zip(got["report"], wanted.report, strict=True):
        assert (mine.action, mine.tokens, mine.few_tokens, mine.note) == (
            its.action, its.tokens, its.few_tokens, its.note), mine.fqn  # fmt: skip
        if its.output_error is not None:
            assert mine.output_error == pytest.approx(its.output_error, rel=1e-2), mine.fqn
            assert mine.output_survival == pytest.approx(its.output_survival, abs=1e-2), mine.fqn
    x = calibrating.inputs(11)[10][0]
    unfolded = calibrating.model()(x)
    errors = [rel(m(x), unfolded) for m in (got["model"], wanted.model)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
    assert errors[0] < rel(oftfx.fold(calibrating.model(), quantized="requantize").model(x), unfolded)
    return wanted


@pytest.mark.parametrize("name", calibrating.SHARES)
def test_as_one_process_with_all_inputs(jobs, name):
    got, counts = of(jobs, f"calibrates-{name}"), calibrating.SHARES[name]
    wanted = check_like_one(got, calibrating.inputs(sum(counts)))
    assert {s.action for s in got["report"]} == {"calibrated", "requantized"}
    assert got["report"].provenance.calibration_inputs == sum(counts)
    if max(counts) <= 8 and sum(counts) <= 8:  # one process measures on the first eight of all
        assert got["report"].measured.output_error == pytest.approx(wanted.report.measured.output_error, rel=1e-2)
        assert got["report"].measured.effect == pytest.approx(wanted.report.measured.effect, rel=1e-5)


def test_shares_of_nothing_add_nothing(jobs):
    """Where one process has all the inputs, its bits are those of a process alone."""
    got, wanted = of(jobs, "calibrates-one has all"), alone(calibrating.inputs(5))
    for name in calibrating.SITES:
        assert torch.equal(weight(got["model"], name), weight(wanted.model, name)), name


def test_a_budget_decides_alike_in_all(jobs):
    got = of(jobs, "calibrates-budget")
    check_like_one(got, calibrating.inputs(8), quantized=calibrating.BUDGET)
    assert {s.action for s in got["report"]} == {"calibrated", "kept"}  # nearest codes were tried first, by the moments


def test_an_expert_that_only_one_process_reaches(jobs):
    got = of(jobs, "calibrates-experts-apart")
    check_like_one(got, [*calibrating.inputs(4, sign=1), *calibrating.inputs(4, sign=-1)])
    tokens = {s.fqn: s.tokens for s in got["report"]}
    assert tokens["experts.0"] == tokens["experts.1"] == tokens["first"] / 2
    assert tokens["experts.2"] is None


def test_in_ddp(jobs):
    check_like_one(of(jobs, "calibrates-in-ddp"), calibrating.inputs(8))


def test_three_processes_one_of_them_without_inputs(three):
    check_like_one(of(three, "calibrates-three"), calibrating.inputs(3))


def check_pooled(got, count, tokens):
    assert got["same"]
    for missed, found in zip((False, True), got["found"], strict=True):
        whole = Shown(*calibrating.rows(count, tokens, missed))
        parts = (whole, *whole.split())
        assert found["tokens"] == tuple(s.tokens for s in parts)
        for (seen, lost), part in zip(found["moments"], parts, strict=True):
            x, y = (torch.cat(column).double() for column in zip(*part.rows(), strict=True))
            assert rel(seen, x.T @ x) < 1e-6
            assert (lost is not None) == missed
            assert lost is None or rel(lost, x.T @ (y - x)) < 1e-5
        rows = [s.sampled(s.tokens, own=own) for s in (whole, parts[2]) for own in (True, False)]
        assert all(torch.equal(a, b) for a, b in zip(found["rows"], rows, strict=True))
        assert found["finite"]


@pytest.mark.parametrize(("count", "tokens"), [(5, 1), (9, 400)])
def test_moments_are_those_of_all_rows(jobs, count, tokens):
    check_pooled(of(jobs, f"pools-{count}-{tokens}"), count, tokens)


def test_moments_of_three(three):
    check_pooled(of(three, "pools-three"), 5, 500)


REFUSED = {
    "other_model": ("FoldError: head.bias differs between process 1 of 2 and the first",) * 2,
    "other_policy": ("FoldError: first differs between process 1 of 2",) * 2,
    "no_inputs": ("FoldError: first: policy 'calibrate' needs calibration=",) * 2,
    "wrong_input": (
        "process 1 of 2: FoldError: calibration: the model cannot be run on",
        "FoldError: calibration: the",
    ),
    "other_width": ("process 0 of 2 has inputs by which a Linear4bit reads 32 features, another by which it reads 33",)
    * 2,
    "not_finite": ("inputs are not finite",) * 2,
    "wrong_argument": ("process 1 of 2: AdapterError", "AdapterError: "),
    "distilled": ("distil is not done by several processes",) * 2,
    "sharded": ("is sharded, and every process has to hold the whole model",) * 2,
    "fails_under_way": ("process 1 of 2: MemoryError: no room", "MemoryError"),
    "interrupted": ("process 1 of 2: KeyboardInterrupt", "interrupted"),
    "rounds_otherwise": ("differs between process 1 of 2 and the first. They have computed different numbers",) * 2,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fails_in_one_fails_in_all(jobs, name):
    for text, wanted in zip(of(jobs, f"refuses-{name}")["texts"], REFUSED[name], strict=True):
        assert wanted in text
        assert "was changed" not in text


def test_where_one_dies_the_other_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv(processes.FOLDER, str(tmp_path / "text"))
    assert processes.run(["dies"], tmp_path, 2, calibrating.__name__) == {"dies": "no result"}
    assert "another process has ended early" in (tmp_path / "text").read_text()


def test_alone_it_is_a_fold_as_any_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    got = alone(calibrating.inputs(2), distributed=True)
    wanted = alone(calibrating.inputs(2))
    assert all(torch.equal(weight(got.model, n), weight(wanted.model, n)) for n in calibrating.SITES)


def test_without_any_other_process_it_is_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(FoldError, match="Start this program with torchrun"):
        alone(calibrating.inputs(2), distributed=True)
