"""PEFT's selection of modules, against the real package on random configurations."""

import random
import warnings
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx.errors import OftfxWarning, RuleError
from oftfx.planning.peft_selection import Selection

pytestmark = [pytest.mark.needs("peft"), pytest.mark.filterwarnings("ignore::UserWarning:peft")]
peft = pytest.importorskip("peft")


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)


class Block(nn.Module):
    def __init__(self, name="mlp"):
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.add_module(name, Mlp())


class Tree(nn.Module):
    """Layers below a name and at the top, experts with numbers of their own, and a head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        below = {"layers": nn.ModuleList([Block(), Block()]), "h": nn.ModuleList([Block("experts")])}
        self.model = nn.ModuleDict(below)
        self.score = nn.Linear(8, 2)
        self.my_score = nn.Linear(8, 8)


FIELDS = {
    "target_modules": [
        ["q"],
        ["q", "down"],
        ["layers.0.q"],
        ["model.layers.1.k", "up"],
        ["0.q", "score"],
        ["my_score", "layers.1.mlp.up"],
        r".*\.(q|down)",
        r"model\.layers\.\d\.k",
        "all-linear",
        "ALL-LINEAR",
    ],
    "exclude_modules": [None, None, ["k"], ["layers.0.q"], r"model\..*", r".*score", ["nothing"]],
    "layers_to_transform": [None, None, None, 0, 1, [0, 1], [1], [], [5]],
    "layers_pattern": [None, None, "layers", "h", ["h", "layers"], [], "(h|layers)"],
    "modules_to_save": [None, None, ["score"], ["my_score"], ["q"], ["layers.1.mlp"], ["mlp", "score"]],
}


def configurations(count, seed=0):
    chosen = random.Random(seed)
    for _ in range(count):
        fields = {name: chosen.choice(values) for name, values in FIELDS.items()}
        if fields["layers_to_transform"] is None:
            fields["layers_pattern"] = None  # PEFT's configuration refuses it
        yield fields


def theirs(fields):
    """The sites and the whole modules of PEFT, or None where it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = peft.get_peft_model(Tree(), peft.OFTConfig(oft_block_size=4, **fields))
        except (ValueError, TypeError):
            return None
    names = [n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad]
    sites = {n.partition(".oft_R.")[0] for n in names if ".oft_R." in n}
    return sites, {n.replace("modules_to_save.default.", "") for n in names if "modules_to_save" in n}


def ours(fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OftfxWarning)
        plan = oftfx.plan(Tree(), peft.OFTConfig(oft_block_size=4, **fields))
    return {e.fqn for e in plan}, set(plan.train)


def outcome(fields):
    """How both sides compare on one configuration."""
    expected = theirs(fields)
    try:
        found = ours(fields)
    except RuleError as error:
        if "PEFT asks only targets of a list for their layer" in str(error):
            return "layers of a string, refused"
        return "both refuse" if expected is None else f"only we refuse: {fields}: {error}"
    if expected is None:
        return f"only PEFT refuses: {fields}"
    return "equal" if found == expected else f"different: {fields}: {found} {expected}"


def test_random_configurations_select_what_peft_selects():
    counts = Counter(outcome(fields) for fields in configurations(400))
    assert set(counts) == {"equal", "both refuse", "layers of a string, refused"}
    assert counts["equal"] > 200


def test_layers_of_a_regular_expression_are_refused_where_peft_passes_over_them():
    fields = {"target_modules": r".*\.q", "layers_to_transform": [0]}
    assert theirs(fields)[0] == {f"{p}.{i}.q" for p in ("layers", "model.layers") for i in (0, 1)} | {"model.h.0.q"}
    with pytest.raises(RuleError, match=r"layers_to_transform=\[0\] with target_modules='\.\*\\\\\.q': PEFT asks only"):
        ours(fields)


def test_names_that_are_not_there():
    with pytest.raises(RuleError, match=r"modules_to_save: no module of Tree has a path that ends with 'heads'"):
        ours({"target_modules": ["q"], "modules_to_save": ["heads"]})
    config = peft.OFTConfig(oft_block_size=4, target_modules=["q"], exclude_modules=["nothing"])
    with pytest.warns(OftfxWarning, match=r"exclude_modules=\['nothing'\]: Tree has no such module"):
        oftfx.plan(Tree(), config)
    headless = nn.ModuleDict({"q": nn.Linear(8, 8)})
    with pytest.warns(OftfxWarning, match=r"task_type='SEQ_CLS': ModuleDict has no module called 'classifier' or"):
        oftfx.plan(headless, peft.OFTConfig(oft_block_size=4, target_modules=["q"], task_type="SEQ_CLS"))
    with pytest.raises(RuleError, match=r"asks for '\(', no regular expression"):
        ours({"target_modules": "("})


def test_the_selection_alone():
    chosen = Selection.of({"target_modules": ["a.q", "k"], "layers_to_transform": 1, "modules_to_save": ["head"]})
    paths = ("a.q", "k", "b.1.k", "b.layers.1.k", "b.layers.2.k", "b.layers.2.a.q", "head.k")
    assert [n for n in paths if chosen.selects(n)] == ["a.q", "k", "b.layers.1.k"]


def test_a_configuration_is_anything_with_its_fields():
    config = SimpleNamespace(**vars(peft.OFTConfig(oft_block_size=4, target_modules=["0"])))
    assert [e.fqn for e in oftfx.plan(nn.Sequential(nn.Linear(8, 8)), config)] == ["0"]
    assert torch.is_tensor(oftfx.transform(nn.Sequential(nn.Linear(8, 8)), config)[0].oft.default.skew)
