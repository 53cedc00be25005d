"""Writes, for each kind of grid, the bytes of the stack of the kernel that the real compiler makes for a GPU."""

import json
import sys

from oftfx.grids import Integers
from oftfx.grids.triton import choose, columns
from oftfx.grids.triton.kernels import columns_kernel
from tests.grids.triton.blocks import GRIDS
from tests.rotation.triton.compile_kernels import compiled, stack


def main(capability):
    found = {}
    for name, grid in GRIDS.items():
        codes = "*i16" if isinstance(grid.levels, Integers) else "*u8"
        kinds = dict.fromkeys(("rest", "upper", "scales", "zeros", "limits", "levels", "errors"), "*fp32")
        kinds |= {"codes": codes, "names": "*u8", "constant": "fp32", "low": "fp32", "high": "fp32"}
        # Triton compiles for a whole number that is 1: the factor lies by columns, and a weight may have one row.
        for width, ones in ((choose.WIDEST, {"upper_row": 1}), (20, {"upper_row": 1, "rest_column": 1, "rows": 1})):
            constants = columns.constants(grid, width, not grid.symmetric) | ones
            made = compiled(columns_kernel, kinds, constants, capability, columns.WARPS, enable_fp_fusion=False)
            text = made.asm["ptx"]
            assert "fma.rn.f32" not in text, name  # a product is rounded before a sum, as torch's operators do
            assert "div.rn.f32" in text, name
            found[f"{name} {width}"] = stack(made)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
