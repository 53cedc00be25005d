"""What is put in front of vLLM's layers, on a layer written here: against dense algebra, and compiled against not."""

import json
from types import SimpleNamespace

import pytest
import torch

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterFileError
from oftfx.serving.vllm import contract
from oftfx.serving.vllm.hooks import fit
from oftfx.serving.vllm.layers import Turns, block_of, room_for, tokens_of, turning
from oftfx.serving.vllm.turns import Turn, is_oft, read_turns
from tests.reference import dense_rotation, randomize, rel

WIDTH, SLICES = 24, (10, 6)


class Layer:
    """Two layers in one, with LoRA of a sort: each slot adds its number."""

    n_slices, output_slices, device, tp_rank = 2, SLICES, torch.device("cpu"), 0

    def __init__(self, width=WIDTH):
        self.base_layer = SimpleNamespace(input_size=width)
        self.input_size = width
        torch.manual_seed(0)
        self.weight = torch.randn(sum(SLICES), width, dtype=torch.float64)

    def create_lora_weights(self, max_loras, lora_config, model_config=None):
        self.slots = max_loras
        self.added = torch.zeros(max_loras)

    def reset_lora(self, index):
        self.added[index] = 0

    def set_lora(self, index, lora_a, lora_b):
        self.added[index] = lora_a[0].sum()

    def apply(self, x, bias=None):
        return self._apply_lora_to_output(x, x @ self.weight.T + (0 if bias is None else bias))

    def _apply_lora_to_output(self, x, output):
        if not torch.compiler.is_compiling():
            self.asked = getattr(self, "asked", 0) + 1
        index = self.punica_wrapper._token_lora_indices[: len(x.flatten(0, -2))]
        return output + self.added[index].to(output.dtype).view(*output.shape[:-1], 1) * x.sum(-1, keepdim=True)


@pytest.fixture
def layer(monkeypatch):
    monkeypatch.setenv("OFTFX_VLLM_BLOCK_SIZE", "6")
    made = turning(Layer)()
    made.create_lora_weights(3, SimpleNamespace(lora_dtype=torch.float64, fully_sharded_loras=False))
    return made


def turn(size, count, seed, shared=False):
    torch.manual_seed(seed)
    rotation = oftfx.Rotation(size * count, OFT(size)).double()
    torch.nn.init.normal_(rotation.skew, std=0.3)
    return Turn(rotation.matrices().detach(), shared)


def dense(turn, width=WIDTH):
    blocks = turn.blocks.expand(width // turn.blocks.shape[-1], -1, -1)
    return torch.block_diag(*blocks).double()


def tokens(index):
    return SimpleNamespace(_token_lora_indices=torch.tensor(index))


def expected(layer, x, index, parts):
    """Row by row."""
    rows = []
    for row, slot in zip(x, index, strict=True):
        ways = parts.get(slot, (torch.eye(WIDTH).double(),) * 2)
        whole = [row @ way @ layer.weight.T for way in ways]
        rows.append(torch.cat([whole[0][: SLICES[0]], whole[1][SLICES[0] :]]))
    return torch.stack(rows)


@pytest.mark.parametrize("index", [[0] * 5, [-1] * 5, [0, -1, 1, 1, 2], [2, 2, 1, -1, -1], [1, 1, 1, 1, 1]], ids=str)
def test_each_token_is_turned_by_its_request(layer, index):
    one, two = turn(6, 4, 1), turn(3, 8, 2)
    both = [layer.fitted(t, torch.float64) for t in (one, two)]
    layer.set_lora(0, both, [torch.zeros(1, 1)] * 2)
    layer.set_lora(1, [both[1], both[1]], [torch.zeros(1, 1)] * 2)
    layer.set_lora(2, [None, both[0]], [None, torch.zeros(1, 1)])
    eye = torch.eye(WIDTH).double()
    parts = {0: (dense(one), dense(two)), 1: (dense(two),) * 2, 2: (eye, dense(one))}
    layer.punica_wrapper = tokens([*index, 7, 7])  # what stands behind the batch is of an earlier one
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    wanted = expected(layer, x, index, parts)
    assert rel(layer.apply(x), wanted) < 1e-14
    assert rel(layer.apply(x.unsqueeze(0))[0], wanted) < 1e-14  # as models of transformers call it
    bias = torch.randn(sum(SLICES), dtype=torch.float64)
    assert rel(layer.apply(x, bias), wanted + bias) < 1e-14
    fixed = torch.compile(layer.apply, backend="eager", fullgraph=True)
    assert rel(fixed(x), wanted) < 1e-14


def test_a_compiled_graph_serves_other_requests(layer):
    """Another adapter in the slot and another batch, and nothing is compiled again."""
    one, two = (layer.fitted(turn(6, 4, s), torch.float64) for s in (1, 2))
    layer.set_lora(0, [one, one], [None, None])
    layer.punica_wrapper = tokens([0, -1, 1, 0, -1])
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer.apply, backend=counted, fullgraph=True)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    first = compiled(x)
    layer.set_lora(1, [two, one], [None, None])
    layer.punica_wrapper._token_lora_indices.copy_(torch.tensor([1, 1, 1, -1, 0]))
    second = compiled(x)
    assert len(graphs) == 1
    assert rel(second, layer.apply(x)) < 1e-14
    assert rel(second, first) > 0.1


def test_lora_takes_the_place_of_a_rotation_and_leaves_none(layer):
    layer.set_lora(1, [layer.fitted(turn(6, 4, 1), torch.float64)] * 2, [None, None])
    layer.set_lora(1, [torch.ones(2, WIDTH), None], [torch.ones(10, 2), None])
    assert layer.added[1] == 2 * WIDTH
    layer.punica_wrapper = tokens([1, 1])
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    assert rel(layer.apply(x), x @ layer.weight.T + 2 * WIDTH * x.sum(1, keepdim=True)) < 1e-14
    layer.set_lora(1, [layer.fitted(turn(6, 4, 1), torch.float64)] * 2, [None, None])
    assert layer.added[1] == 0
    layer.reset_lora(1)
    assert torch.equal(layer.apply(x), Layer.apply(layer, x))
    assert layer.slots == 4  # one more than asked for: see `create_lora_weights`


@pytest.mark.parametrize("sharded", [False, True])
def test_lora_and_rotations_in_one_batch(monkeypatch, sharded):
    """LoRA is asked once, for its own tokens, however often the layer multiplies; not at all where none has one."""
    monkeypatch.setenv("OFTFX_VLLM_BLOCK_SIZE", "6")
    layer = turning(Layer)()
    layer.create_lora_weights(3, SimpleNamespace(lora_dtype=torch.float64, fully_sharded_loras=sharded))
    one, two = turn(6, 4, 1), turn(3, 8, 2)
    layer.set_lora(0, [layer.fitted(t, torch.float64) for t in (one, two)], [None, None])
    layer.set_lora(1, [torch.full((1, 1), 0.5), None], [None, None])
    x, index = torch.randn(5, WIDTH, dtype=torch.float64), [0, 1, -1, 1, 0]
    layer.punica_wrapper = tokens(index)
    wanted = expected(layer, x, index, {0: (dense(one), dense(two))})
    wanted += (torch.tensor(index) == 1).double()[:, None] * 0.5 * x.sum(1, keepdim=True)
    assert rel(layer.apply(x), wanted) < 1e-14
    assert layer.asked == (2 if sharded else 1)
    layer.punica_wrapper = tokens([0, -1, 0, 0, -1])
    layer.apply(x)
    assert layer.asked == (4 if sharded else 1)
    layer.punica_wrapper = tokens([-1] * 5)
    assert rel(layer.apply(x), x @ layer.weight.T) < 1e-14
    assert layer.asked == (4 if sharded else 1)
    assert rel(torch.compile(layer.apply, backend="eager", fullgraph=True)(x), x @ layer.weight.T) < 1e-14


def test_a_rank_takes_the_blocks_of_its_inputs(monkeypatch):
    monkeypatch.setenv("OFTFX_VLLM_BLOCK_SIZE", "6")
    whole = turn(6, 8, 3)
    halves = []
    x = torch.randn(4, 48, dtype=torch.float64)
    for rank in (0, 1):
        made = turning(Layer)()
        made.base_layer.input_size, made.tp_rank, made.n_slices = 48, rank, 1
        made.create_lora_weights(1, SimpleNamespace(lora_dtype=torch.float64, fully_sharded_loras=False))
        made.set_lora(0, made.fitted(whole, torch.float64), torch.zeros(1, 1))
        made.punica_wrapper = tokens([0] * 4)
        made.weight = torch.eye(24, dtype=torch.float64)
        halves.append(made.apply(x[:, 24 * rank : 24 * (rank + 1)]))
    assert rel(torch.cat(halves, 1), x @ dense(whole, 48)) < 1e-12
    made.input_size = 20
    with pytest.raises(ValueError, match="20 of a layer's 48 inputs, no whole blocks of 6"):
        made.create_lora_weights(1, SimpleNamespace(lora_dtype=torch.float64, fully_sharded_loras=False))


def test_what_there_is_room_for(monkeypatch):
    assert room_for() == (32,)
    monkeypatch.setenv("OFTFX_VLLM_BLOCK_SIZE", "6,16")
    assert [block_of(width, room_for()) for width in (96, 18, 32, 35)] == [48, 6, 16, 1]
    for text in ("", "0", "big", "4,-2"):
        monkeypatch.setenv("OFTFX_VLLM_BLOCK_SIZE", text)
        with pytest.raises(ValueError, match="sizes of blocks"):
            room_for()


def test_blocks_in_larger_ones():
    small = turn(3, 8, 1)
    assert torch.equal(torch.block_diag(*small.in_blocks_of(12, 24)), torch.block_diag(*small.blocks))
    shared = turn(3, 1, 1, shared=True)
    assert torch.equal(torch.block_diag(*shared.in_blocks_of(6, 12)), torch.block_diag(*[shared.blocks[0]] * 4))
    with pytest.raises(AdapterFileError, match="turns 24 inputs, the layer has 12"):
        small.in_blocks_of(12, 12)
    with pytest.raises(AdapterFileError, match="blocks are of size 3, and there is room for blocks of 8"):
        small.in_blocks_of(8, 24)


@pytest.mark.parametrize("convention", ["peft", "oftfx"])
@pytest.mark.parametrize(
    "spec",
    [OFT(4), OFT(3, parameterization="cayley"), OFT(6, block_share=True), OFT(blocks=4, coft_eps=0.3), OFT(4, terms=2)],
    ids=str,
)
def test_directories(tmp_path, spec, convention):
    """Against the rotations of the model that was saved."""
    base = torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.Linear(24, 6))
    model = randomize(oftfx.transform(base, {"*": spec}), std=0.3)
    oftfx.save_adapter(model, tmp_path / "adapter", convention=convention)
    assert is_oft(tmp_path / "adapter")
    turns = read_turns(tmp_path / "adapter")
    assert sorted(turns) == ["0", "1"]
    for name, found in turns.items():
        rotation = model.get_submodule(f"{name}.oft.default")
        width = rotation.in_features
        got = torch.block_diag(*found.in_blocks_of(width, width))
        assert rel(got, torch.block_diag(*rotation.matrices().detach())) < 1e-7
    if spec == OFT(3, parameterization="cayley"):
        skew = model.get_parameter("0.oft.default.skew").detach()
        wanted = dense_rotation(skew, 3, 4, parameterization="cayley")
        assert rel(torch.block_diag(*turns["0"].blocks).double(), wanted) < 1e-6


def test_directories_that_are_none(tmp_path):
    assert not is_oft(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    assert not is_oft(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert not is_oft(tmp_path)


def test_an_adapter_is_fitted_whole_or_not_at_all(layer):
    whole = SimpleNamespace(
        modules={"a.qkv": layer, "a.joined": layer, "a.other": object()},
        packed_modules={"a.qkv": ["a.q", "a.k"], "a.joined": ["a.x", "a.y", "a.z"]},
        lora_config=SimpleNamespace(lora_dtype=torch.float64, fully_sharded_loras=False),
    )

    def adapter(**turns):
        return SimpleNamespace(
            loras={k.replace("_", "."): SimpleNamespace(lora_a=None, oftfx_turns=t) for k, t in turns.items()}
        )

    fine = adapter(a_q=turn(6, 4, 1), a_k=turn(3, 8, 1))
    fit(fine, whole, "x")
    assert [w.lora_a.shape for w in fine.loras.values()] == [(4, 6, 6)] * 2
    for name, reason in (
        ("a_v", "a.v is not a layer of this server's model"),
        ("a_other", "is a object"),
        ("a_y", "of other parts"),
    ):
        with pytest.raises(ValueError, match=reason):
            fit(adapter(a_q=turn(6, 4, 1), **{name: turn(6, 4, 1)}), whole, "x")
    with pytest.raises(ValueError, match=r"x: a\.q: it turns 48 inputs"):
        fit(adapter(a_q=turn(6, 8, 1)), whole, "x")


def test_tokens_are_looked_up_once_a_batch():
    wrapper = tokens([1, -1, 1, 0])
    first = tokens_of(wrapper, 3)
    assert {s: t.tolist() for s, t in first.items()} == {1: [0, 2]}
    assert tokens_of(wrapper, 3) is first
    wrapper._token_lora_indices.copy_(torch.tensor([0, 0, 0, 0]))
    assert {s: t.tolist() for s, t in tokens_of(wrapper, 3).items()} == {0: [0, 1, 2]}


def test_a_vllm_that_this_does_not_fit(monkeypatch):
    monkeypatch.setattr(contract, "_version", lambda _: None)
    assert contract.faults() == ["there is no vLLM"]
    monkeypatch.setattr(contract, "_version", lambda _: "0.40.1")
    assert contract.faults() == ["this is vLLM 0.40.1 (set OFTFX_VLLM_UNTESTED=1 to try it all the same)"]
    monkeypatch.setattr(contract, "_version", lambda _: "0.32.0")
    monkeypatch.setattr(contract, "_CALLS", {"json:dumps": ("obj",), "json:gone": ()})
    monkeypatch.setattr(contract, "_THERE", ("json:loads", "json:also_gone"))
    found = contract.faults()
    assert found[0].startswith("json:dumps takes obj, skipkeys")
    assert found[1:] == ["json:gone is gone", "json:also_gone is gone"]


def test_the_mixin_overrides_what_the_contract_names():
    named = {where.rpartition(".")[2] for where in contract._CALLS if "BaseLinearLayer" in where}
    assert named == {n for n in ("apply", "create_lora_weights", "reset_lora", "set_lora") if n in vars(Turns)} | {
        "_apply_lora_to_output"
    }
