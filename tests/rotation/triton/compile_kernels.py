"""Writes, for each kernel that the real compiler makes for a GPU, the bytes of its stack: what found no register."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from oftfx.rotation.triton import cayley, cayley_kernels, choose, kernels
from oftfx.rotation.triton.tiles import Tiling

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ALIGNED = [["tt.divisibility", 16]]


def compiled(kernel, kinds, constants, capability, warps, **options):
    """A kernel for operands of these kinds; what is left is a whole number."""
    signature, values, facts = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        else:
            signature[name] = kinds.get(name, "i32")
        if isinstance(signature[name], tuple):
            facts |= {(i, j): ALIGNED for j in range(len(signature[name]))}
        elif signature[name].startswith("*") or name == "n":
            facts[(i,)] = ALIGNED
    source = ASTSource(kernel, signature, values, facts)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, **options})


def stack(made):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", said)[1])


def main(capability):
    found = {}
    for dtype, groups, size, count in [
        (torch.float32, 128, 32, 1),
        (torch.float32, 100, 27, 2),
        (torch.float32, 16, 256, 1),
        (torch.bfloat16, 128, 32, 2),
        (torch.float16, 585, 7, 1),
        (torch.bfloat16, 16, 256, 1),
    ]:
        t = Tiling.of(4096, groups, size, dtype)
        constants = {"count": count, "size": size, "per": t.per, "parts": t.parts, "tiles": t.tiles, "width": t.width}
        constants |= {"wide": False, "x_column": 1, "out_stride": 1}
        here = "*" + NAMES[dtype]
        kinds = {"x": here, "ys": (here,) * count, "blocks": "*fp32", "sums": "*fp32"}
        for name in ("spread_kernel", "gather_kernel", "outer_kernel"):
            height = min(t.height, t.width) if name == "outer_kernel" else t.height
            made = compiled(getattr(kernels, name), kinds, constants | {"height": height}, capability, warps=4)
            found[f"{name} {here} {size} {count}"] = stack(made)
    for size in (choose.LARGEST_SERIES, 7):
        for name in ("series_kernel", "series_backward_kernel"):
            kernel = getattr(cayley_kernels, name)
            constants = {"size": size, "double": 3, "single": True, "width": cayley.power(size)}
            kinds = dict.fromkeys(("skew", "blocks", "grad", "grad_skew"), "*fp32")
            found[f"{name} {size}"] = stack(compiled(kernel, kinds, constants, capability, cayley.WARPS))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
