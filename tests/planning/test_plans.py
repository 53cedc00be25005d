import re
import resource
import time

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT, Plan, Rule
from oftfx.errors import RuleError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(12, 8), nn.Linear(12, 8)
        self.norm, self.mixed = nn.LayerNorm(12), nn.Bilinear(3, 5, 3)
        self.down = nn.Linear(8, 12)

    def forward(self, x):
        x = self.norm(x)
        return self.down(self.q(x) + self.k(x))


@pytest.fixture
def model():
    return nn.Sequential(Block(), Block())


def test_the_first_matching_rule_decides(model):
    plan = oftfx.plan(model, [Rule("0.q", None), Rule("*.q", OFT(4)), Rule("all-linear", OFT(2))])
    assert [(e.fqn, e.block_size, e.blocks) for e in plan] == [
        ("0.k", 2, 6), ("0.down", 2, 4), ("1.q", 4, 3), ("1.k", 2, 6), ("1.down", 2, 4),
    ]  # fmt: skip
    assert plan.trainable == 6 + 4 + 3 * 6 + 6 + 4
    assert [(s.fqn, s.reason) for s in plan.skipped] == [("0.q", "excluded by '0.q'")]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("*.q", ["0.q", "1.q"]),
        (r"re:1\.(q|k)", ["1.q", "1.k"]),
        (nn.Linear, ["0.q", "0.k", "0.down", "1.q", "1.k", "1.down"]),
        (lambda site: site.out_features == 12, ["0.down", "1.down"]),
    ],
)
def test_every_kind_of_target(model, target, expected):
    assert [e.fqn for e in oftfx.plan(model, {target: OFT(4)})] == expected


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q", r"rule 'q' matches no layer of Sequential\. Did you mean '\*\.q'\?"),
        ("*.dwn", r"Nearest: \*\.down"),
        ("re:.*dwn", r"Nearest: \*\.down"),
        (nn.Conv2d, r"rule 'Conv2d' matches no layer.*of class \['Linear'\]"),
        ("*.mixed", r"matches 2 layers, none of which can be rotated, e\.g\. 0\.mixed \(Bilinear\)"),
        (nn.Bilinear, r"rule 'Bilinear' matches 2 layers, none of which can be rotated, e\.g\. 0\.mixed \(Bilinear\)"),
    ],
)
def test_a_rule_that_matches_nothing_names_the_nearest(model, target, message):
    with pytest.raises(RuleError, match=message):
        oftfx.plan(model, {target: OFT(4)})
    assert len(oftfx.plan(model, [Rule(target, OFT(4), optional=True), Rule("*.q", OFT(4))])) == 2


def test_indivisible_sizes_are_listed_together(model):
    with pytest.raises(RuleError) as error:
        oftfx.plan(model, {"all-linear": OFT(5)})
    first, second = str(error.value).splitlines()
    assert first.startswith("0.q and 3 more: block_size 5 does not divide in_features 12. Divisors: 1, 2, 3, 4, 6, 12.")
    assert re.match(r"0\.down and 1 more: block_size 5 does not divide in_features 8", second)


def test_what_the_inputs_of_a_convolution_are_is_said():
    net = nn.Sequential(nn.Conv2d(6, 8, (3, 1), groups=2))
    with pytest.raises(RuleError, match=r"in_features 9 \(3 channels of a group x kernel 3 x 1\)"):
        oftfx.plan(net, {"0": OFT(2)})


def test_nearest_is_noted(model):
    plan = oftfx.plan(model, {"*.q": OFT(5, on_indivisible="nearest")})
    assert plan["0.q"].block_size == 4
    assert "nearest" in plan["0.q"].notes[0]


def test_a_plan_is_json_both_ways_and_prints(model):
    x = torch.randn(2, 3, 12)
    plan = oftfx.plan(model, {"*.q": OFT(4, share_input=True), "*.k": OFT(4, share_input=True)}, example_inputs=(x,))
    assert Plan.from_json(plan.to_json()) == plan
    assert plan["0.k"].owner == "0.q"
    assert plan["0.q"].same_input == ("0.k",)
    text = str(plan)
    assert "{0..1}.q" in text
    assert "4 sites, 2 rotations, 36 trainable numbers" in text
    assert "captured: whole program" in text
    assert plan.table(full=True).count("linear") == 4


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"oftfx_plan": 99}', '{"oftfx_plan": 1}'])
def test_from_json_refuses_what_is_not_a_plan(text):
    with pytest.raises(RuleError, match=r"not an oftfx plan|version 99|damaged oftfx plan"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("version", "advice"), [(7, "A newer oftfx wrote it: install that"), (0, "An older one wrote it: make it again")]
)
def test_a_plan_of_another_version_is_refused_with_the_version(model, version, advice):
    text = oftfx.plan(model, {"*.q": OFT(4)}).to_json().replace('"oftfx_plan": 1', f'"oftfx_plan": {version}')
    with pytest.raises(RuleError, match=rf"this plan has version {version}; this oftfx reads version 1\. {advice}"):
        Plan.from_json(text)


def test_a_plan_is_carried_out_on_the_model_it_fits(model):
    plan = oftfx.plan(model, {"*.q": OFT(4)})
    assert [n for n, _ in oftfx.transform(model, plan).named_parameters() if "oft" in n] == [
        "0.q.oft.default.skew",
        "1.q.oft.default.skew",
    ]
    with pytest.raises(RuleError, match=r"rotates 0\.q, which Linear does not have"):
        oftfx.transform(nn.Linear(3, 3), plan)
    model[0].q = nn.Linear(8, 8)
    with pytest.raises(RuleError, match=r"0\.q with in_features 12; this model's has 8"):
        oftfx.transform(model, plan)


def test_planning_changes_nothing_and_works_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(Block(), Block())
    plan = oftfx.plan(model, {"all-linear": OFT(4)}, example_inputs=(torch.empty(2, 3, 12, device="meta"),))
    assert len(plan) == 6
    assert plan.trace.rung == "graph"
    assert plan["1.q"].same_input == ("1.k",)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_without_example_inputs_the_plan_is_from_the_tree(model):
    plan = oftfx.plan(model, {"*.q": OFT(4, share_input=True)})
    assert plan.trace.rung == "tree"
    assert "example inputs" in plan.trace.reason
    assert plan["0.q"].owner == "0.q"


def test_sites_that_never_ran_are_named(model):
    model[0].unused = nn.Linear(4, 4)
    plan = oftfx.plan(model, {"all-linear": OFT(4)}, example_inputs=(torch.randn(2, 12),))
    assert plan.trace.never_called == ("0.unused",)


def test_train_and_bias(model):
    plan = oftfx.plan(model, {"*.q": OFT(4)}, train=["norm"], train_bias="oft")
    assert plan.train == (
        "0.norm.weight",
        "0.norm.bias",
        "1.norm.weight",
        "1.norm.bias",
        "0.q.bias",
        "1.q.bias",
    )
    with pytest.raises(RuleError, match=r"train: no module 'nrom'\. Nearest: .*norm"):
        oftfx.plan(model, {"*.q": OFT(4)}, train=["nrom"])
    with pytest.raises(RuleError, match=r"trains whole, but rules also rotate 0\.q"):
        oftfx.plan(model, {"*.q": OFT(4)}, train=["0.q"])
    with pytest.raises(RuleError, match="train_bias: got 'some'"):
        oftfx.plan(model, {"*.q": OFT(4)}, train_bias="some")


def test_a_rule_that_decides_nothing_is_refused(model):
    with pytest.raises(RuleError, match=r"rule '0\.q' decides nothing: .* earlier rules \('\*'\) match all its layers"):
        oftfx.plan(model, {"*": OFT(4), "0.q": None})
    assert len(oftfx.plan(model, [Rule("*", OFT(4)), Rule("0.q", None, optional=True)])) == 6


def test_layers_that_are_read_but_never_called_are_refused():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return nn.functional.linear(self.a(x), self.b.weight * 2, self.b.bias)

    plan = oftfx.plan(Functional(), {"*": OFT(3)}, example_inputs=(torch.randn(2, 6),))
    assert [e.fqn for e in plan] == ["a"]
    assert [(s.fqn, s.reason) for s in plan.skipped] == [
        ("b", "it is used by mul in the model itself, where no axis is its input")
    ]
    # Without example inputs nobody can know; the fold then sees that the layer never ran.
    x = torch.randn(2, 6)
    model = oftfx.transform(Functional(), {"*": OFT(3)})
    model(x)
    with torch.no_grad():
        for skew in oftfx.adapter_parameters(model):
            skew.normal_(std=0.1)
    with pytest.warns(oftfx.errors.OftfxWarning, match="b: this layer has never been called while others have"):
        oftfx.fold(model)


def test_torchs_attention_is_linear():
    model = nn.TransformerEncoderLayer(8, 2, 12)
    plan = oftfx.plan(model, {"all-linear": OFT(4)})
    assert [(e.fqn, e.placement) for e in plan] == [
        ("self_attn.in_proj_weight", "weight"),
        ("self_attn.out_proj", "weight"),
        ("linear1", "activation"),
        ("linear2", "activation"),
    ]
    assert plan["self_attn.out_proj"].site.reader == "self_attn"
    assert [e.fqn for e in oftfx.plan(model, {"self_attn": OFT(4)})] == ["self_attn.in_proj_weight"]


def test_a_layer_with_two_names_answers_to_both():
    model = nn.ModuleDict({"a": nn.Linear(6, 6)})
    model["b"] = model["a"]
    assert [(e.fqn, e.site.aliases) for e in oftfx.plan(model, {"b": OFT(3)})] == [("a", ("b",))]


def test_a_model_that_is_a_layer_is_explained():
    with pytest.raises(RuleError, match=r"wrap it: nn\.Sequential\(model\)"):
        oftfx.plan(nn.Linear(4, 4), "all-linear")


@pytest.mark.needs("transformers")
def test_eighty_layers_are_planned_without_weights_in_seconds():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                         num_key_value_heads=8, vocab_size=128256)  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    plan = oftfx.plan(model, {"all-linear": OFT(32, share_input=True)})
    assert time.perf_counter() - start < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200 * 1024  # KiB; the weights are 260 GiB
    assert (len(plan), plan.rotations, plan.trace.rung) == (560, 320, "graph")
    assert sum(e.producer is not None for e in plan) == 80  # every o_proj
