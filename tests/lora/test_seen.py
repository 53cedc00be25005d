import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from oftfx.lora.seen import see
from oftfx.planning.program import Program


def site_of(layer):
    return Program.of(nn.Sequential(layer)).sites[0]


CONVOLUTIONS = [
    (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 3, 7, 9)),
    (nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 6, 5)),
    (nn.Conv2d(3, 4, (2, 4), padding="same"), (2, 3, 6, 5)),
    (nn.Conv2d(3, 4, 1), (2, 3, 6, 5)),
    (nn.Conv2d(3, 4, 3, padding="valid"), (3, 6, 5)),
    (nn.Conv1d(5, 4, 3, padding=1, stride=2), (2, 5, 11)),
    (nn.Conv3d(2, 4, (2, 3, 1), padding=(0, 1, 0)), (2, 2, 4, 5, 3)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda v: str(v))
def test_patches_are_what_the_layer_multiplies(layer, shape):
    """Only patches X with ``X W^T + b`` the layer's own output explain it, for every W: so compare their moments."""
    layer, x = layer.double(), torch.randn(shape, dtype=torch.float64)
    seen = see(site_of(layer), layer, [x])
    w = torch.randn_like(layer.weight)
    with torch.no_grad():
        layer.weight.copy_(w)
        y = layer(x) - layer.bias.view(-1, *(1 for _ in layer.kernel_size))
    matrix = w.flatten(1)
    rows = y.transpose(-1 - len(layer.kernel_size), 0).flatten(1)  # (out, positions)
    assert rows.shape[1] == seen.tokens
    assert torch.allclose(rows @ rows.T, matrix @ seen.moments @ matrix.T, rtol=1e-12)
    if layer.__class__ is nn.Conv2d and x.dim() == 4 and layer.padding not in ("same", "valid"):
        patches = (
            F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).transpose(1, 2).flatten(0, 1)
        )
        assert torch.allclose(seen.moments, patches.T @ patches, rtol=1e-12)


def test_of_an_embedding_it_is_how_often_a_row_is_looked_up():
    layer = nn.Embedding(7, 4)
    seen = see(site_of(layer), layer, [torch.tensor([[1, 1], [6, 2]]), torch.tensor([1])])
    assert seen.moments.tolist() == [0, 3, 1, 0, 0, 0, 1]
    assert seen.tokens == 5


def test_zeros_show_nothing():
    layer = nn.Linear(6, 4)
    assert see(site_of(layer), layer, [torch.zeros(3, 6)]) is None
