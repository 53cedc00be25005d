"""Buffers of modules that train whole belong to the adapter that trained them."""

import copy

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError, AdapterFileError
from tests.adapter.test_save_load import rewrite
from tests.reference import randomize, rel


class Running(nn.Module):
    """Puts another tensor in its buffer's place in every forward, and has one that no state_dict holds."""

    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
            self.calls = self.calls + 1
        return (x - self.mean) * self.scale + self.calls


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), Running(8), nn.Linear(8, 3))


SPEC = {"0": OFT(4)}
WHOLE = ["1", "3"]
STATE = ("running_mean", "running_var", "num_batches_tracked")


def trained(model, adapter="default", seed=0):
    """After some steps of ``adapter``, which acts, on data of its own."""
    oftfx.set_adapter(model, adapter)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(oftfx.adapter_parameters(model), lr=0.1)
    model.train()
    for _ in range(3):
        x = torch.randn(16, 12, generator=generator) * (2 + seed) + seed
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(7))


def test_the_base_is_bit_for_bit_the_base_after_training():
    plain, given = base().eval(), base()
    model = trained(oftfx.transform(given, SPEC, train=WHOLE))
    assert rel(model(X), plain(X)) > 1e-2
    with oftfx.disable_adapters(model):
        assert torch.equal(model(X), plain(X))
    assert torch.equal(given.eval()(X), plain(X))
    assert int(model[1].num_batches_tracked) == 3
    assert float(model[3].calls) == 3
    with oftfx.disable_adapters(model):
        assert int(model[1].num_batches_tracked) == 0
        assert float(model[3].calls) == 0


def test_two_adapters_have_a_copy_each_and_switching_switches():
    model = oftfx.transform(base(), SPEC, adapter="a", train=WHOLE)
    oftfx.add_adapter(model, "b", {"2": OFT(4)}, train=WHOLE)
    alone = {
        "a": trained(oftfx.transform(base(), SPEC, adapter="a", train=WHOLE), "a", 1),
        "b": trained(oftfx.transform(base(), {"2": OFT(4)}, adapter="b", train=WHOLE), "b", 2),
    }
    trained(model, "a", 1)
    trained(model, "b", 2)
    for name in "abab":
        oftfx.set_adapter(model, name)
        assert torch.equal(model(X), alone[name](X))
        for buffer in STATE:
            assert torch.equal(getattr(model[1], buffer), getattr(alone[name][1], buffer))
    oftfx.set_adapter(model, None)
    assert torch.equal(model(X), base().eval()(X))


def test_two_adapters_of_one_module_cannot_act_at_once():
    model = oftfx.transform(base(), SPEC, adapter="a", train=["1"])
    oftfx.add_adapter(model, "b", {"2": OFT(4)}, train=["1", "3"])
    oftfx.add_adapter(model, "c", {"2": OFT(4)}, train=["3"])
    for call in (lambda: oftfx.set_adapter(model, ["a", "b"]), lambda: oftfx.fold(model, adapter=["a", "b"])):
        with pytest.raises(AdapterError, match=r"'a' and 'b' cannot act at once: each has its own 1\.bias"):
            call()
    assert oftfx.active_adapters(model) == ("a",)
    oftfx.set_adapter(model, ["a", "c"])


@pytest.mark.parametrize("convention", ["peft", "oftfx"])
def test_saved_and_loaded_with_the_adapter(tmp_path, convention):
    model = trained(oftfx.transform(base(), SPEC, train=["1", "3"]), seed=3)
    oftfx.save_adapter(model, tmp_path, convention=convention)
    model[3].calls.zero_()  # in no state_dict, so in no file
    again = oftfx.load_adapter(base(), tmp_path).eval()
    assert torch.equal(again(X), model(X))
    assert again[1].num_batches_tracked.dtype == torch.int64
    with oftfx.disable_adapters(again):
        assert torch.equal(again(X), base().eval()(X))
    # Into an adapter that is there, that has run meanwhile, and that acts.
    there = trained(oftfx.transform(base(), SPEC, train=["1", "3"]), seed=1)
    oftfx.load_adapter(there, tmp_path)
    there[3].calls.zero_()
    assert torch.equal(there(X), model(X))


def test_a_file_without_the_statistics_is_refused(tmp_path):
    model = trained(oftfx.transform(base(), SPEC, train=["1"]))
    oftfx.save_adapter(model, tmp_path)
    rewrite(tmp_path, lambda t: t.pop("base_model.model.1.running_var"))
    with pytest.raises(AdapterFileError, match=r"no 1\.running_var of 1, which trains whole"):
        oftfx.load_adapter(base(), tmp_path)


def test_statistics_of_another_kind_of_number_are_refused(tmp_path):
    model = trained(oftfx.transform(base(), SPEC, train=["1"]))
    oftfx.save_adapter(model, tmp_path)
    key = "base_model.model.1.running_var"
    rewrite(tmp_path, lambda t: t.update({key: t[key].int()}))
    with pytest.raises(AdapterFileError, match=r"1\.running_var has dtype torch\.int32, the model's torch\.float32"):
        oftfx.load_adapter(base(), tmp_path)


def test_copies_moves_folds_and_removal():
    model = oftfx.transform(base(), SPEC, adapter="a", train=WHOLE)
    oftfx.add_adapter(model, "b", {"2": OFT(4)}, train=WHOLE)
    trained(model, "a", 1)
    trained(model, "b", 2)
    twin = copy.deepcopy(model)
    expected = model(X)
    folded = oftfx.fold(model)
    assert rel(folded.model(X), expected) < 1e-6
    assert torch.equal(oftfx.unfold(folded)(X), expected)
    trained(twin, "b", 5)
    assert torch.equal(model(X), expected)
    model.double()  # reaches what is mounted only
    for name in ("a", None, "b"):
        oftfx.set_adapter(model, name)
        assert model(X.double()).dtype == torch.float64
    assert rel(model(X.double()), expected) < 1e-6
    oftfx.set_adapter(model, None)
    for name in "ab":
        oftfx.remove_adapter(model, name)
    assert rel(model(X.double()), base().eval()(X)) < 1e-6


def test_a_copy_over_the_same_tensors_has_statistics_of_its_own():
    """What one of them trains, whichever acted when it was copied, the other does not see."""
    model = oftfx.transform(base(), SPEC, adapter="a", train=["1"])
    oftfx.add_adapter(model, "b", {"2": OFT(4)}, train=["1"])
    expected = {n: oftfx.set_adapter(model, n) or model[1].running_mean.clone() for n in "ab"}
    other = oftfx.transform(model, {"4": OFT(4)}, adapter="c")
    for name in "ab":
        trained(other, name, 1)
    for name in "ab":
        oftfx.set_adapter(model, name)
        assert torch.equal(model[1].running_mean, expected[name])


@pytest.mark.needs("peft")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_files_of_peft_both_ways(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.OFTConfig(oft_block_size=4, target_modules=["0"], modules_to_save=["1"])
    theirs = peft.get_peft_model(base(), config)
    for name, parameter in theirs.named_parameters():
        if ".oft_R." in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.train()
    for seed in range(3):
        theirs(torch.randn(16, 12, generator=torch.Generator().manual_seed(seed)) * 3 + 1)
    theirs.eval()
    theirs.base_model.model[3].mean.zero_()  # a module that does not train whole runs on all the same
    theirs.base_model.model[3].calls.zero_()
    expected = theirs(X)
    theirs.save_pretrained(tmp_path / "peft")
    ours = oftfx.load_adapter(base(), tmp_path / "peft").eval()
    assert rel(ours(X), expected) <= 1e-6
    assert int(ours[1].num_batches_tracked) == 3
    with oftfx.disable_adapters(ours), theirs.disable_adapter():
        assert rel(ours(X), theirs(X)) <= 1e-6
        assert torch.equal(ours(X), base().eval()(X))
    oftfx.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert rel(again(X), expected) <= 1e-6
    made = randomize(oftfx.transform(base(), config))
    assert set(oftfx.adapters(made)["default"].train_buffers) == {f"1.{s}" for s in STATE}
