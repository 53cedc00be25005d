"""An adapter of another tool: which convention its file has, loaded, folded, and written for the tool again."""

import torch
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from torch import nn

import oftfx


def base() -> nn.Sequential:
    """The base model, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(288, 16)).eval()


x = torch.randn(2, 3, 8, 8)
LycorisNetwork.apply_preset({"target_module": [], "target_name": [".*"]})
theirs = base()
network = create_lycoris(theirs, 1.0, algo="diag-oft", linear_dim=4, conv_dim=4)
network.apply_to()
for parameter in network.parameters():
    nn.init.normal_(parameter, std=0.2)
network.save_weights("adapter.safetensors", torch.float32, {})

# --8<-- [start:load]
print(oftfx.adapter_convention("adapter.safetensors"))  # lycoris
model = oftfx.load_adapter(base(), "adapter.safetensors")
folded = oftfx.fold(model).model
# --8<-- [end:load]

# --8<-- [start:back]
oftfx.save_adapter(model, "back.safetensors", convention="lycoris")
oftfx.save_adapter(model, "directory", convention="oftfx")  # says everything, whatever the adapter was read from
# --8<-- [end:back]

again = base()
create_lycoris_from_weights(1.0, "back.safetensors", again)[0].apply_to()
with torch.no_grad():
    expected, plain = theirs(x), base()(x)
    found = {"read": model(x), "folded": folded(x), "back": again(x)}
assert oftfx.adapter_convention("adapter.safetensors") == "lycoris"
assert (expected - plain).norm() > 0.1 * plain.norm()
for name, outputs in found.items():
    assert (outputs - expected).norm() < 1e-6 * expected.norm(), name
