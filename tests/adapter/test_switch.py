import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError, OftfxWarning, RuleError
from tests.reference import dense_rotation, rel


@pytest.fixture
def model():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 5)).double()
    model = oftfx.transform(base, {"0": OFT(4)}, adapter="a")
    oftfx.add_adapter(model, "b", {"2": OFT(6)}, train=["1"])
    oftfx.add_adapter(model, "c", {"0": OFT(3), "2": OFT(4)})
    for name in "abc":
        for parameter in oftfx.adapter_parameters(model, name):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def expected(model, x, names):
    def rotated(index, x):
        for name in names:
            rotation = getattr(model[index].oft, name, None)
            if rotation is not None:
                x = x @ dense_rotation(rotation.skew, rotation.block_size)
        return x @ model[index].weight.T + model[index].bias

    return rotated(2, model[1](rotated(0, x)))


@pytest.mark.parametrize("names", [None, "a", "b", "c", ["a", "b"], ["a", "c"], ["c", "a"], ["c", "b", "a"], []])
def test_named_adapters_act_in_the_order_named(model, names):
    x = torch.randn(4, 12, dtype=torch.float64)
    oftfx.set_adapter(model, names)
    acting = () if names is None else (names,) if isinstance(names, str) else tuple(names)
    assert oftfx.active_adapters(model) == acting
    assert rel(model(x), expected(model, x, acting)) < 1e-13


def test_whole_modules_follow_the_active_adapter(model):
    base = model[1].weight
    oftfx.set_adapter(model, "b")
    assert model[1].weight is not base
    assert not torch.equal(model[1].weight, base)
    oftfx.set_adapter(model, "a")
    assert model[1].weight is base
    assert torch.equal(base, torch.ones_like(base))


def test_disabling_is_undone_also_after_an_error(model):
    x = torch.randn(4, 12, dtype=torch.float64)
    oftfx.set_adapter(model, ["a", "b"])
    before = model(x)
    with pytest.raises(KeyError), oftfx.disable_adapters(model):
        assert rel(model(x), expected(model, x, ())) < 1e-13
        raise KeyError
    assert torch.equal(model(x), before)
    assert oftfx.active_adapters(model) == ("a", "b")


def test_adapter_parameters(model):
    assert len(oftfx.adapter_parameters(model)) == 1  # "a" acts
    assert len(oftfx.adapter_parameters(model, "b")) == 3
    oftfx.set_adapter(model, ["b", "c"])
    assert len(oftfx.adapter_parameters(model)) == 5


def test_removing_adapters_gives_the_plain_model_back(model):
    x = torch.randn(4, 12, dtype=torch.float64)
    oftfx.set_adapter(model, None)
    for name in "abc":
        oftfx.remove_adapter(model, name)
    assert oftfx.adapters(model) == {}
    assert not any("oft" in k for k in model.state_dict())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert rel(model(x), nn.Sequential(*model)(x)) == 0.0


class DataParallel(nn.Module):
    """Holds the model as torch's own wrappers do."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_wrapped_models_find_their_adapters(model):
    for wrapped in (DataParallel(model), torch.compile(model, backend="eager"), DataParallel(torch.compile(model))):
        assert list(oftfx.adapters(wrapped)) == ["a", "b", "c"]
        oftfx.set_adapter(wrapped, "c")
        assert oftfx.active_adapters(model) == ("c",)
        oftfx.set_adapter(wrapped, "a")
        with pytest.raises(AdapterError, match="wraps the model; transform the model itself"):
            oftfx.transform(wrapped, {"*2": OFT(4)}, adapter="d")


def test_a_part_that_was_transformed_on_its_own_is_named(model):
    outer = nn.Sequential(model, nn.Linear(5, 5))
    with pytest.raises(AdapterError, match="Sequential has no adapters itself, but its part '0' has"):
        oftfx.fold(outer)
    with pytest.raises(AdapterError, match="the part '0' of this model was transformed on its own"):
        oftfx.transform(outer, {"1": OFT(5)})


def test_what_is_not_mounted_follows_moves_and_replaced_parameters(model):
    """`.float()` and `load_state_dict(assign=True)` reach only what is in the model; the rest follows when it acts."""
    oftfx.set_adapter(model, "b")
    model.float()
    x = torch.randn(4, 12)
    for name in ("a", "b", None, "c"):
        oftfx.set_adapter(model, name)
        assert model(x).dtype == torch.float32
    oftfx.set_adapter(model, "b")
    state = {k: v.clone() + (k == "1.weight") for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    expected = model(x)
    with oftfx.disable_adapters(model):
        assert not torch.equal(model[1].weight, state["1.weight"])
    assert torch.equal(model[1].weight, state["1.weight"])
    assert torch.equal(model(x), expected)


def test_a_second_adapter_keeps_the_tie_of_what_it_trains():
    base = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False))
    base[2].weight = base[0].weight
    model = oftfx.transform(base, {"1": OFT(2)}, adapter="a", train=["2"])
    oftfx.add_adapter(model, "b", {"1": OFT(4)}, train=["2"])
    for name in ("a", "b", None):
        oftfx.set_adapter(model, name)
        assert model[2].weight is model[0].weight


def test_removing_while_disabled(model):
    warned = pytest.warns(OftfxWarning, match="adapter 'a' acted and was removed; 'b' acts now")
    with warned, oftfx.disable_adapters(model):
        oftfx.remove_adapter(model, "a")
        assert oftfx.active_adapters(model) == ()
    assert oftfx.active_adapters(model) == ("b",)
    assert list(oftfx.adapters(model)) == ["b", "c"]


def trainable(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_only_what_acts_requires_gradients(model):
    own = {
        "a": {"0.oft.a.skew"},
        "b": {"2.oft.b.skew", "1.weight", "1.bias"},
        "c": {"0.oft.c.skew", "2.oft.c.skew"},
    }
    assert trainable(model) == own["a"]
    for names in ("b", "c", ["c", "b"], [], "a"):
        oftfx.set_adapter(model, names)
        assert trainable(model) == {n for name in names for n in own[name]}
    with oftfx.disable_adapters(model):
        assert model[1].weight.requires_grad is False
    assert trainable(model) == own["a"]


def test_an_adapter_can_be_frozen_and_stays_so(model):
    oftfx.set_adapter(model, "b", trainable=False)
    assert trainable(model) == set()
    oftfx.set_adapter(model, ["b", "a"])
    assert trainable(model) == {"0.oft.a.skew"}
    oftfx.set_adapter(model, "b", trainable=True)
    assert trainable(model) == {"2.oft.b.skew", "1.weight", "1.bias"}


def test_adding_leaves_what_requires_gradients_as_it_was(model):
    model[0].oft.a.skew.requires_grad_(False)  # the user's own wish
    oftfx.add_adapter(model, "d", {"2": OFT(3)})
    assert trainable(model) == set()


def test_removing_what_acts_lets_the_first_of_the_others_act(model):
    oftfx.set_adapter(model, ["c", "b"])
    oftfx.remove_adapter(model, "c")
    assert oftfx.active_adapters(model) == ("b",)
    with pytest.warns(OftfxWarning, match="adapter 'b' acted and was removed; 'a' acts now"):
        oftfx.remove_adapter(model, "b")
    assert oftfx.active_adapters(model) == ("a",)
    assert trainable(model) == {"0.oft.a.skew"}
    oftfx.remove_adapter(model, "a")
    assert oftfx.active_adapters(model) == ()


@pytest.mark.needs("peft")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_switching_and_removing_are_as_in_peft():
    """The same parameters train and the same adapters act, after each of the same steps."""
    peft = pytest.importorskip("peft")

    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 5))

    def config(**more):
        return peft.OFTConfig(oft_block_size=4, target_modules=["0"], modules_to_save=["2"], **more)

    def theirs_trainable():
        names = [n.removeprefix("base_model.model.") for n, p in theirs.named_parameters() if p.requires_grad]
        parts = [n.replace("modules_to_save", "oft_R").split(".") for n in names]
        return {(site, adapter) for site, _, adapter, *_ in parts}

    def ours_trainable():
        acting = oftfx.active_adapters(ours)
        return {(n.split(".")[0], n.split(".")[2] if ".oft." in n else acting[0]) for n in trainable(ours)}

    theirs = peft.get_peft_model(base(), config(), adapter_name="b")
    ours = oftfx.transform(base(), config(), adapter="b")
    for name in "ca":
        theirs.add_adapter(name, config())
        oftfx.add_adapter(ours, name, config())
        assert ours_trainable() == theirs_trainable() == {("0", "b"), ("2", "b")}
    for name in "cab":
        theirs.set_adapter(name)
        oftfx.set_adapter(ours, name)
        assert ours_trainable() == theirs_trainable() == {("0", name), ("2", name)}
    theirs.set_adapter("c")
    oftfx.set_adapter(ours, "c")
    theirs.delete_adapter("c")
    with pytest.warns(OftfxWarning, match="'a' acts now"):
        oftfx.remove_adapter(ours, "c")
    assert list(theirs.active_adapters) == list(oftfx.active_adapters(ours)) == ["a"]
    assert ours_trainable() == theirs_trainable() == {("0", "a"), ("2", "a")}
    theirs.add_adapter("frozen", config(inference_mode=True))
    oftfx.add_adapter(ours, "still", config(inference_mode=True))
    assert ours_trainable() == theirs_trainable() == {("0", "a"), ("2", "a")}
    theirs = peft.get_peft_model(base(), config(inference_mode=True))
    ours = oftfx.transform(base(), config(inference_mode=True))
    assert ours_trainable() == theirs_trainable() == set()


def test_a_recorded_graph_says_that_it_cannot_switch(model):
    graph = oftfx.graph(model, (torch.randn(3, 12, dtype=torch.float64),))
    with pytest.raises(AdapterError, match="a recorded graph computes with the adapters it was recorded with"):
        oftfx.set_adapter(graph, None)
    assert len(oftfx.adapter_parameters(graph)) == 1


def test_errors(model):
    with pytest.raises(AdapterError, match="no adapter 'd'; the model has a, b, c"):
        oftfx.set_adapter(model, ["a", "d"])
    assert oftfx.active_adapters(model) == ("a",)
    with pytest.raises(AdapterError, match="named twice"):
        oftfx.set_adapter(model, ["a", "a"])
    with pytest.raises(AdapterError, match="already has an adapter 'a'"):
        oftfx.add_adapter(model, "a", {"0": OFT(4)})
    with pytest.raises(RuleError, match="matches no layer"):
        oftfx.add_adapter(model, "d", {"7": OFT(4)})
    assert list(oftfx.adapters(model)) == ["a", "b", "c"]
    with pytest.raises(AdapterError, match="Linear has no adapters"):
        oftfx.set_adapter(nn.Linear(3, 3), "a")
    assert oftfx.adapters(nn.Linear(3, 3)) == {}
    assert oftfx.active_adapters(nn.Linear(3, 3)) == ()


def test_trained_values_are_kept_when_switching(model):
    oftfx.set_adapter(model, "c")
    optimizer = torch.optim.SGD(oftfx.adapter_parameters(model), lr=0.1)
    model(torch.randn(4, 12, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    values = [p.detach().clone() for p in oftfx.adapter_parameters(model)]
    oftfx.set_adapter(model, "a")
    oftfx.set_adapter(model, "c")
    assert all(torch.equal(p, v) for p, v in zip(oftfx.adapter_parameters(model), values, strict=True))
