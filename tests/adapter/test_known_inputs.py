"""Adapters from files know what transform knows: who reads the same tensor, and what makes it."""

import json

import pytest
import torch

import oftfx
from oftfx import OFT
from oftfx.adapter import load
from oftfx.errors import AdapterFileError
from oftfx.placement.find import rotated_sites
from tests.reference import randomize, rel

pytestmark = [pytest.mark.needs("transformers"), pytest.mark.filterwarnings("ignore::UserWarning:peft")]

FIELDS = ("owner", "same_input", "placement", "local_input", "producer", "producer_reason", "tied_blocks", "blocks")


def known(plan):
    return {e.fqn: tuple(getattr(e, f) for f in FIELDS) for e in plan}


def groups(model):
    found = {}
    for fqn, placement in rotated_sites(model):
        if placement.group is not None:
            found.setdefault(id(placement.group), set()).add(fqn.removeprefix("model.layers."))
    return sorted(map(sorted, found.values()))


PAIRS = [
    [f"{i}.{n}" for n in names]
    for i in (0, 1)
    for names in (("mlp.gate_proj", "mlp.up_proj"), ("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"))
]


@pytest.fixture
def recorded(monkeypatch):
    """The models that reading a file recorded."""
    models, record = [], load.record_best
    monkeypatch.setattr(load, "record_best", lambda model, *a, **k: models.append(model) or record(model, *a, **k))
    return models


@pytest.fixture
def file_of_peft(tiny_llama, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.OFTConfig(target_modules="all-linear", oft_block_size=8)
    theirs = peft.get_peft_model(tiny_llama(num_key_value_heads=4), config).eval()
    for name, parameter in theirs.named_parameters():
        if ".oft_R." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


@pytest.mark.needs("peft")
@pytest.mark.parametrize("others", [False, True], ids=["alone", "beside another"])
def test_a_file_of_pefts(tiny_llama, ids, file_of_peft, monkeypatch, recorded, others):
    base = tiny_llama(num_key_value_heads=4)
    wanted = known(oftfx.plan(base, {"all-linear": OFT(8)}))
    model = tiny_llama(num_key_value_heads=4)
    if others:  # it acts while the file is read
        model = randomize(oftfx.transform(model, {"*.q_proj": OFT(4)}, adapter="other"), std=0.1)
    model = oftfx.load_adapter(model, file_of_peft)
    assert len(recorded) == 1  # what the next two tests say does not happen there
    plan = oftfx.adapters(model)["default"]
    assert known(plan) == wanted
    assert plan.trace.rung == "graph"
    assert oftfx.active_adapters(model) == (("other",) if others else ("default",))
    oftfx.set_adapter(model, "default")
    assert groups(model) == PAIRS
    made = []
    joint = oftfx.placement.group.rotate_jointly
    monkeypatch.setattr("oftfx.placement.group.rotate_jointly", lambda *a: made.append(a) or joint(*a))
    expected = model(**ids()).logits
    assert len(made) == 4  # q, k, v and gate, up of two layers
    assert rel(expected, base(**ids()).logits) > 1e-2
    result = oftfx.fold(model, into="producer")
    assert [s.fqn for s in result.report if s.action == "into producer"] == [
        f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)
    ]
    assert rel(result.model(**ids()).logits, expected) < 1e-5


@pytest.mark.needs("peft")
def test_values_alone_need_no_recording(tiny_llama, ids, file_of_peft, recorded):
    model = oftfx.load_adapter(tiny_llama(num_key_value_heads=4), file_of_peft)
    expected = model(**ids()).logits
    randomize(model, std=0.3, seed=5)
    recorded.clear()
    assert torch.equal(oftfx.load_adapter(model, file_of_peft)(**ids()).logits, expected)
    assert recorded == []


@pytest.mark.parametrize(
    "rules",
    [{"all-linear": OFT(8, share_input=True)}, {"*.o_proj": OFT(8, into="producer")}],
    ids=["shared", "tied"],
)
def test_a_saved_plan_keeps_what_it_knows(tiny_llama, ids, tmp_path, recorded, rules):
    model = randomize(oftfx.transform(tiny_llama(), {"*.v_proj": OFT(4), **rules}), std=0.1)
    plan = oftfx.adapters(model)["default"]
    oftfx.save_adapter(model, tmp_path, convention="oftfx")
    loaded = oftfx.load_adapter(tiny_llama(), tmp_path)
    assert recorded == []  # the plan says it all
    again = oftfx.adapters(loaded)["default"]
    assert known(again) == known(plan)
    assert again.trace == plan.trace
    assert groups(loaded) == groups(model)
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    handouts = {f: p.group.handout.local for f, p in rotated_sites(loaded) if p.group}
    assert handouts == {f: p.group.handout.local for f, p in rotated_sites(model) if p.group}
    assert torch.equal(loaded(**ids()).logits, model(**ids()).logits)
    mine, theirs = (oftfx.fold(m, into="producer") for m in (loaded, model))
    assert [(s.fqn, s.action) for s in mine.report] == [(s.fqn, s.action) for s in theirs.report]
    assert torch.equal(mine.model(**ids()).logits, theirs.model(**ids()).logits)


def test_a_saved_plan_whose_shared_blocks_disagree_with_the_numbers_is_refused(tiny_llama, tmp_path):
    model = randomize(oftfx.transform(tiny_llama(), {"*.o_proj": OFT(8, into="producer")}), std=0.1)
    oftfx.save_adapter(model, tmp_path, convention="oftfx")
    path = tmp_path / "oftfx_plan.json"
    saved = json.loads(path.read_text())
    for change in ([0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2]):
        saved["entries"][0]["tied_blocks"] = change
        path.write_text(json.dumps(saved))
        base = tiny_llama()
        with pytest.raises(AdapterFileError, match="blocks that share their parameters in oftfx_plan.json"):
            oftfx.load_adapter(base, tmp_path)
        assert oftfx.adapters(base) == {}


def test_an_adapter_that_is_added_while_another_acts(tiny_llama):
    model = randomize(oftfx.transform(tiny_llama(), {"all-linear": OFT(8)}), std=0.1)
    first = oftfx.adapters(model)["default"]
    second = oftfx.add_adapter(model, "second", {"all-linear": OFT(8)})
    assert known(second) == known(first)
    assert oftfx.active_adapters(model) == ("default",)
