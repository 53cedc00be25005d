"""A weight format of one's own: a layer with int8 codes and one scale a row, rotated and folded."""

import torch
import torch.nn as nn
import torch.nn.functional as F

import oftfx

# --8<-- [start:format]
from oftfx.formats import (
    Codes,
    Geometry,
    Grid,
    Integers,
    Partition,
    ScalarFormat,
    format_of,
    register_format,
)


class RowsLinear(nn.Module):
    """A layer of somebody's package: ``W = codes * scale``, one scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1) / 127
        codes = (weight / scale.unsqueeze(1)).round().to(torch.int8)
        self.register_buffer("codes", codes)  # int8 (out, in)
        self.register_buffer("scale", scale)  # float32 (out,)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.codes.to(x.dtype) * self.scale.to(x.dtype).unsqueeze(1)
        return F.linear(x, weight, self.bias)


class Rows(ScalarFormat):
    """How `RowsLinear` stores its weight."""

    name = "rows"

    def matches(self, module: nn.Module) -> bool:
        """By class name and tensors, so that the package need not be imported."""
        return type(module).__name__ == "RowsLinear" and "codes" in module._buffers

    def geometry(self, module: nn.Module) -> Geometry:
        """(in, out); right for every packing."""
        rows, columns = module.codes.shape
        return Geometry("linear", columns, rows)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """What the layer stands for."""
        return module.scale.dtype

    def grid(self, module: nn.Module) -> Grid:
        """Which elements share a scale, and which levels there are."""
        rows, columns = module.codes.shape
        whole_rows = Partition.tiles((rows, columns), (1, columns))
        return Grid(whole_rows, Integers(-127, 127, reach=127))

    def codes(self, module: nn.Module) -> Codes:
        """What is stored; never a view of it."""
        return Codes(module.codes.to(torch.int16), module.scale.float().clone())

    def pack(self, coded: Codes, like: nn.Module) -> dict[str, torch.Tensor]:
        """The same in the layer's own storage."""
        scale = coded.scale.to(like.scale.dtype)
        return {"codes": coded.codes.to(torch.int8), "scale": scale}

    def read(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """References to what holds the weight now."""
        return {"codes": module.codes, "scale": module.scale}

    def write(self, module: nn.Module, state: dict[str, torch.Tensor]) -> None:
        """Put such a state into the layer."""
        module._buffers.update(state)

    def nbytes(self, module: nn.Module) -> int:
        """Of the stored weight with its scales."""
        return module.codes.numel() + module.scale.numel() * module.scale.element_size()

    def make_tiny(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """A small layer with random weights, for the conformance suite."""
        return RowsLinear(nn.Linear(in_features, out_features, bias=bias))


register_format(Rows())  # asked before the built-in formats
# --8<-- [end:format]

# --8<-- [start:use]
base = nn.Sequential(Rows().make_tiny(64, 48), nn.ReLU(), Rows().make_tiny(48, 16)).eval()
model = oftfx.transform(base, {"*": oftfx.OFT(16)}).eval()
x = torch.randn(256, 64)
for parameter in oftfx.adapter_parameters(model):
    nn.init.normal_(parameter, std=0.02)  # instead of training
results = {policy: oftfx.fold(model, quantized=policy, calibration=[(x,)]) for policy in ("keep", "float", "calibrate")}
print(results["calibrate"].report)
# --8<-- [end:use]

assert format_of(base[0]).name == "rows"
assert [site.format for site in results["calibrate"].report] == ["rows", "rows"]
for policy, bound in {"keep": 1e-6, "float": 1e-6, "calibrate": 0.02}.items():
    assert results[policy].report.output_error < bound, (policy, results[policy].report.output_error)
weight = base[0].codes.double() * base[0].scale.double().unsqueeze(1)
blocks = torch.block_diag(*model[0].oft.default.matrices().detach().double())
folded = results["calibrate"].model[0]
new = folded.codes.double() * folded.scale.double().unsqueeze(1)
assert folded.codes.dtype == torch.int8
assert (new - weight @ blocks.T).norm() < 0.02 * weight.norm()
assert (new - weight).norm() > 0.04 * weight.norm(), "the update is too small to see whether it arrived"
