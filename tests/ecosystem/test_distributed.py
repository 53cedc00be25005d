"""Two gloo processes, each on half a batch, against one process on the whole batch."""

import re

import pytest
import torch
import torch.distributed as dist

import oftfx
from tests.ecosystem import network, processes
from tests.ecosystem.twin import dense_twin
from tests.reference import randomize, rel

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Every job's result; the two processes are started once."""
    return processes.run(list(processes.JOBS), tmp_path_factory.mktemp("jobs"))


@pytest.fixture
def result(jobs):
    def of(name):
        if isinstance(jobs[name], str):
            pytest.fail(jobs[name], pytrace=False)
        return jobs[name]

    return of


def check_same_run(got, share):
    """Losses, last gradients, rotations, and the model that the rotations fold to."""
    model, expected = processes.single(share)
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-12)
    assert expected["losses"][0] != pytest.approx(expected["losses"][-1], rel=1e-2)
    assert got["skews"].keys() == expected["skews"].keys()
    assert all(rel(got["skews"][n], p) < 1e-10 for n, p in expected["skews"].items())
    if "grads" in got:
        assert got["grads"].keys() == expected["grads"].keys() == expected["skews"].keys()
        assert all(rel(got["grads"][n], g) < 1e-10 for n, g in expected["grads"].items())
    fresh = network.transformed(share, std=0.0)
    fresh.load_state_dict(got["skews"], strict=False)
    x = processes.data(9)[0]
    expected = dense_twin(network.base(), model)(x)
    assert rel(oftfx.fold(fresh).model(x), expected) < 1e-10


@pytest.mark.parametrize("share", [False, True])
def test_ddp(result, share):
    got = result(f"ddp-{share}")
    check_same_run(got, share)
    assert got["apart"] == 0.0
    twin = dense_twin(network.base(), processes.single(share)[0]).state_dict()
    assert got["folded"].keys() == twin.keys()
    assert all(rel(got["folded"][n], w) < 1e-10 for n, w in twin.items())


@pytest.mark.parametrize("name", ["ddp-static-graph", "ddp-bucket-view"])
def test_ddp_with_other_options(result, name):
    check_same_run(result(name), True)


def test_ddp_takes_the_rotations_of_the_first_process(result):
    got = result("ddp-start-apart")
    check_same_run(got, False)
    assert got["apart"] == 0.0


def test_ddp_accumulates(result):
    got = result("ddp-accumulates")
    model = network.transformed(True)
    x, y = processes.data(0)
    torch.nn.functional.mse_loss(model(x), y).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    assert all(rel(got[n], g) < 1e-12 for n, g in expected.items())


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("units", ["root", "blocks", "layers"])
def test_fsdp2(result, units, share):
    check_same_run(result(f"fsdp2-{units}-{share}"), share)


def test_fsdp2_with_activation_checkpointing(result):
    check_same_run(result("fsdp2-checkpointed"), True)


def test_fsdp1(result):
    check_same_run(result("fsdp1"), True)


def test_fsdp2_in_mixed_precision_follows_the_exact_run(result):
    got, (_, exact) = result("fsdp2-narrow"), processes.single(True)
    assert got["losses"] != pytest.approx(exact["losses"], rel=1e-9)
    assert got["losses"] == pytest.approx(exact["losses"], rel=2e-2)
    assert all(p.dtype == torch.float64 for p in got["skews"].values())


def test_fsdp2_evaluates_what_it_has_just_learnt(result):
    got, model, x = result("fsdp2-evaluates"), network.transformed(True), processes.data(7)[0]
    for step, (output, state) in enumerate(zip(got["outputs"], got["states"], strict=True)):
        model.load_state_dict(state)
        assert rel(output, dense_twin(network.base(), model)(x)) < 1e-10, step
    assert rel(got["outputs"][0], got["outputs"][-1]) > 1e-3


def test_fsdp2_computes_with_what_was_loaded(result):
    for seed, output in enumerate(result("fsdp2-loads")["outputs"]):
        model = randomize(network.transformed(False), std=0.3, seed=seed)
        assert rel(output, dense_twin(network.base(), model)(processes.data(7)[0])) < 1e-10, seed


def test_fsdp2_switches_adapters(result):
    got, x = result("fsdp2-api"), processes.data(7)[0]
    assert rel(got["silent"], network.base()(x)) < 1e-12
    assert rel(got["after"], dense_twin(network.base(), network.transformed(True))(x)) < 1e-10
    assert got["active"] == ("default",)
    assert set(got["kinds"]) == {"DTensor"}


@pytest.mark.parametrize("dtype", processes.DTYPES)
@pytest.mark.parametrize("units", ["blocks", "layers"])
def test_fsdp2_folds_its_rows_where_they_are(result, units, dtype):
    """Byte for byte the fold of the gathered model, and its report."""
    got = result(f"fsdp2-folds-{units}-{dtype}")
    assert got["state"].keys() == got["gathered"].keys()
    assert all(torch.equal(got["state"][n], w) for n, w in got["gathered"].items())
    for mine, theirs in zip(*got["lines"], strict=True):
        assert mine[:2] == theirs[:2]
        assert mine[2:] == pytest.approx(theirs[2:], rel=1e-3, abs=1e-9)
    assert rel(got["after"], got["before"]) < (1e-10 if dtype == "float64" else 2e-2)
    assert torch.equal(got["after"], got["again"])


def test_fsdp2_folds_where_some_processes_have_no_rows(result):
    got = result("fsdp2-folds-few-rows")
    assert all(torch.equal(got["state"][n], w) for n, w in got["whole"].items())
    assert got["lines"][0] == got["lines"][1]
    assert {a for _, a in got["lines"][0]} == {"folded", "untouched"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A distributed checkpoint that two processes have written."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(processes.FOLDER, str(folder / "checkpoint"))
        assert processes.run(["fsdp2-saves"], folder) == {"fsdp2-saves": {}}
    return folder / "checkpoint"


@pytest.mark.parametrize("world", [1, 4])
def test_a_distributed_checkpoint_goes_on_with_any_number_of_processes(world, saved, tmp_path, monkeypatch):
    monkeypatch.setenv(processes.FOLDER, str(saved))
    found = processes.run(["fsdp2-resumes"], tmp_path, world)["fsdp2-resumes"]
    assert not isinstance(found, str), found
    model = network.transformed(True)
    processes.train(model, steps=3)  # in one process, without a break
    wanted = {n: p for n, p in model.named_parameters() if ".oft." in n}
    assert found["skews"].keys() == wanted.keys()
    assert all(rel(found["skews"][n], p) < 1e-9 for n, p in wanted.items())


def test_a_fold_of_shards_is_undone(result):
    got = result("fsdp2-fold-is-undone")
    assert len(got["messages"]) == 2
    assert all("inplace=True" in m for m in got["messages"])
    assert got["same"]
    assert torch.equal(got["before"], got["after"])


def test_a_fold_of_shards_fails_in_all_processes_at_once(result):
    mine, its = result("fsdp2-fold-fails-together")["texts"]
    assert "another process could not fold its rows" in mine
    assert "blocks.1.k" in its
    assert "not finite" in its


ROW, TAIL = (
    r"its weight \(16, 16\) lies in 2 processes \(S(hard)?\(",
    r"\nRotations .* load the folded checkpoint with it$",
)
BOTH = rf"^blocks\.0\.q and 5 more: {ROW}.*0\)\)\nblocks\.0\.o and 1 more: {ROW}.*1\)\){TAIL}"
CUT = {
    "column": rf"^blocks\.0\.k: {ROW}.*0\)\){TAIL}",
    "row": rf"^blocks\.0\.o and 1 more: {ROW}.*1\)\){TAIL}",
    "mixed": BOTH,
    "all-linear": BOTH,
    "by class": BOTH,
    "fsdp2": r"^blocks\.0\.q and 9 more: .*\nhead: .*\nRotations .*transform first, then fully_shard",
}


@pytest.mark.parametrize("name", CUT)
def test_layers_that_are_cut_over_processes_are_refused(result, name):
    assert re.search(CUT[name], result("tensor-parallel")["texts"][name])


def test_beside_tensor_parallel_layers_whole_ones_rotate_and_what_is_folded_is_cut(result):
    got, x = result("tensor-parallel"), processes.data(7)[0]
    assert rel(got["folded"], oftfx.fold(network.transformed(True)).model(x)) < 1e-10
    model = randomize(oftfx.transform(network.base(), {"head": oftfx.OFT(8)}), std=0.3)
    model(x).square().sum().backward()
    assert rel(got["after"], model(x)) < 1e-10
    assert all(rel(a, p.grad) < 1e-10 for a, p in zip(got["grads"], oftfx.adapter_parameters(model), strict=True))


@pytest.mark.needs("transformers")
def test_transformers_tensor_parallel_layers_are_refused_also_where_their_weights_are_plain_parts():
    """Those of quantized models: transformers runs them by a forward of its own."""
    from transformers.distributed.tensor_parallel import ColwiseParallel

    model = network.base()
    layer = model.blocks[0].q
    layer._hf_quantized_needs_local_tp = True  # on every quantized layer of some kinds, also where nothing is cut
    oftfx.transform(model, {"all-linear": oftfx.OFT(8)})
    ColwiseParallel().install_forward(layer, None)
    with pytest.raises(oftfx.errors.RuleError, match="blocks.0.q: transformers runs it on a part of its weight"):
        oftfx.transform(model, {"all-linear": oftfx.OFT(8)})


@pytest.fixture(scope="module")
def aware(tmp_path_factory):
    """The jobs that train through the fold."""
    return processes.run(list(processes.AWARE), tmp_path_factory.mktemp("aware"))


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize("how", processes.WAYS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_training_through_the_fold(aware, kind, how):
    got = aware[f"{kind}-{how}"]
    if isinstance(got, str):
        pytest.fail(got, pytrace=False)
    model, losses, expected = processes.aware(how)
    assert got["losses"] == pytest.approx(losses, rel=1e-4)
    assert losses[0] != pytest.approx(losses[-1], rel=1e-2)
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {n.rpartition(".")[2] for n in trains if ".oft." in n} == {"skew" if how == "requantize" else "shift"}
    start = dict(processes.quantized.rotated().named_parameters())
    for name, value in expected.items():
        before = start.get(name, torch.zeros_like(value))  # scales start where they are
        if name in trains:
            assert rel(got["trained"][name] - before, value - before) < 2e-2, name
        else:
            assert torch.equal(got["trained"][name], before), name
    if kind == "ddp":
        assert set(got["lines"]) == {"as trained"}
        folded = oftfx.fold(model).model
        for name, weight in got["weights"].items():
            assert rel(weight, processes.quantized.weight(folded, name)) < 1e-3, name
