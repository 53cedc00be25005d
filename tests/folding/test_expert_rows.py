"""The rows that experts read, against the routing computed by hand."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from oftfx.folding.expert_rows import rows_of_experts
from oftfx.folding.shown import Call, ExpertCalls, Shown

pytestmark = pytest.mark.needs("transformers")


def mixtral(implementation):
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=12, intermediate_size=10, num_local_experts=5, num_experts_per_tok=2)
    config._experts_implementation = implementation
    module = MixtralExperts(config).requires_grad_(False)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def shown(module, xs, chosen, fellow=None, others=None):
    calls = [Call(x, (x, i), {"top_k_weights": torch.rand(i.shape)}) for x, i in zip(xs, chosen, strict=True)]
    return Shown(xs, others or [None] * len(xs), experts=ExpertCalls(calls, fellow))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_by_routing(implementation):
    torch.manual_seed(0)
    module = mixtral(implementation)
    seen = []
    module.register_forward_hook(lambda *_: seen.append(1))
    xs = [torch.randn(7, 12), torch.randn(9, 12)]
    chosen = [torch.stack([torch.randperm(4)[:2] for _ in x]) for x in xs]  # nobody takes the last expert
    first = rows_of_experts(module, ("gate_up_proj", 2), shown(module, xs, chosen))
    second = rows_of_experts(module, ("down_proj", 2), shown(module, xs, chosen))
    assert first[4] is None
    assert second[4] is None
    for expert in range(4):
        mine = [x[(i == expert).any(1)] for x, i in zip(xs, chosen, strict=True)]
        found = torch.cat(list(first[expert].inputs))
        # In the order of the tokens for each of the two choices: compared as sets of rows.
        assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, torch.cat(mine).tolist()))
        gate, up = F.linear(found, module.gate_up_proj[expert]).chunk(2, -1)
        assert torch.allclose(torch.cat(list(second[expert].inputs)), F.silu(gate) * up, atol=1e-6)
    assert not seen  # nobody's hook has seen the runs
    assert module.config._experts_implementation == implementation


def test_the_unfolded_model_is_seen_on_the_same_tokens():
    torch.manual_seed(1)
    module, fellow = mixtral("eager"), mixtral("eager")
    xs, others = [torch.randn(8, 12)], [torch.randn(8, 12)]
    chosen = [torch.stack([torch.randperm(5)[:2] for _ in range(8)])]
    found = rows_of_experts(module, ("gate_up_proj", 2), shown(module, xs, chosen, fellow, others))
    for one in (f for f in found if f is not None):
        at = [int((xs[0] == row).all(1).nonzero()) for row in one.inputs[0]]
        assert torch.equal(one.unfolded[0], others[0][at])
    inner = rows_of_experts(module, ("down_proj", 2), shown(module, xs, chosen, fellow, others))
    for expert, one in enumerate(inner):
        if one is not None:
            gate, up = F.linear(found[expert].unfolded[0], fellow.gate_up_proj[expert]).chunk(2, -1)
            assert torch.allclose(one.unfolded[0], F.silu(gate) * up, atol=1e-6)


def test_every_token_given_to_all_as_zeros():
    """As Llama 4 does it: one product of all experts, of inputs that are zero where the router says no."""
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    module = Llama4TextExperts(Llama4TextConfig(hidden_size=12, intermediate_size=6, num_local_experts=3))
    for parameter in module.requires_grad_(False).parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 5, 12)
    x[0, 2:], x[1, :2], x[2] = 0, 0, 0
    other = torch.randn(3, 5, 12)
    other[0, 1:], other[1, :3] = 0, 0
    flat = x.view(-1, 12)
    calls = [Call(flat, (flat,), {})]
    alone = rows_of_experts(module, ("gate_up_proj", 1), Shown([calls[0].x], [None], experts=ExpertCalls(calls, None)))
    assert torch.equal(alone[0].inputs[0], x[0, :2])
    assert torch.equal(alone[1].inputs[0], x[1, 2:])
    assert alone[2] is None
    pairs = Shown([calls[0].x], [other.view(-1, 12)], experts=ExpertCalls(calls, module))
    both = rows_of_experts(module, ("gate_up_proj", 1), pairs)
    assert torch.equal(both[0].inputs[0], x[0, :1])
    assert torch.equal(both[0].unfolded[0], other[0, :1])
    assert torch.equal(both[1].unfolded[0], other[1, 3:])


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: torch.einsum("ti,eoi->to", x, w),
        lambda x, w: x @ w.sum(0).T,
        lambda x, w: F.linear(x, w[0, :4]),  # half an expert
        lambda x, w: x @ w[0].reshape(6, 8),  # along another axis
        lambda x, w: F.linear(x, w.flatten(0, 1)),  # two at once
    ],
)
def test_other_uses_are_not_guessed(use):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 8, 6), requires_grad=False)

        def forward(self, x):
            return use(x, self.w)

    module, x = Experts(), torch.randn(3, 6)
    calls = [Call(x, (x,), {})]
    assert rows_of_experts(module, ("w", 2), Shown([x], [None], experts=ExpertCalls(calls, None))) is None
