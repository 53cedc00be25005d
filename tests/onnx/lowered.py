"""Quantized layers of every format and kind, and what each has to become in an ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn as nn

SIZES = (192, 320, 64)
THREES = (192, 288, 64)  # divisible by 96
"""Inputs, features between, outputs of a network of two layers."""
OPERATORS = {
    "nbits": {"com.microsoft::MatMulNBits": 2, "Gemm": 0, "MatMul": 0, "DequantizeLinear": 0},
    "bnb4": {"com.microsoft::MatMulBnb4": 2, "Gemm": 0, "MatMul": 0},
    "dq": {"DequantizeLinear": 2, "Gemm": 2, "MatMul": 0},
    "table": {"Gather": 2, "Mul": 2, "Gemm": 2, "MatMul": 0, "DequantizeLinear": 0},
    "tables": {"Gather": 4, "Mul": 2, "Gemm": 2, "MatMul": 0, "DequantizeLinear": 0},  # also of zeros
    "values": {"Gather": 2, "Gemm": 2, "Mul": 0, "MatMul": 0, "DequantizeLinear": 0},
    "cast": {"Gather": 0, "Mul": 2, "Gemm": 2, "MatMul": 0, "DequantizeLinear": 0},
    "books": {"Gather": 2, "ReduceSum": 2, "Gemm": 2, "MatMul": 0},
}
"""How a weight is computed: how often operators occur in a network of two."""


@dataclass(frozen=True)
class Case:
    """One kind of layer.

    Attributes:
        package: what makes it.
        make: from a float Linear.
        ways: of `OPERATORS`, by dialect.
        opset: by dialect.
        bits: of a weight in the file.
        group: weights that share a scale, or None for a row.
        scale, zero: bytes of each in the file.
        table: bytes of a look-up table in the file.
        ordered: whether columns are in an order of their own.
        bound: relative error allowed.
        sizes: of the network.
    """

    package: str
    make: Callable[[nn.Linear], nn.Module]
    ways: dict[str, str]
    opset: dict[str, int]
    bits: float
    group: int | None
    scale: float
    zero: float
    table: int
    ordered: bool
    bound: float
    sizes: tuple[int, int, int]

    def nbytes(self, rows: int, columns: int, dialect: str) -> float:
        """Of the weight in the file, without the shapes of its operators."""
        count = rows * columns
        table = self.table if self.ways[dialect] in ("table", "tables", "values") else 0
        zero = 4 if self.zero == 2 and dialect == "openvino" else self.zero  # it takes no float16 there
        scales = count / (self.group or columns) * (self.scale + zero)
        return count * self.bits / 8 + scales + table + (4 * columns if self.ordered else 0)


def case(
    package: str,
    make: Callable[[nn.Linear], nn.Module],
    ways: str,
    opset: tuple[int, int, int] = (20, 20, 20),
    *,
    bits: float = 4,
    group: int | None = None,
    scale: float = 4,
    zero: float = 0,
    table: int = 0,
    ordered: bool = False,
    bound: float = 2e-6,
    sizes: tuple[int, int, int] = SIZES,
) -> Case:
    """``ways``: for ``ort``, ``standard`` and ``openvino``."""
    dialects = ("ort", "standard", "openvino")
    by_way, by_opset = dict(zip(dialects, ways.split(), strict=True)), dict(zip(dialects, opset, strict=True))
    return Case(package, make, by_way, by_opset, bits, group, scale, zero, table, ordered, bound, sizes)


def bnb(**kwargs: Any) -> Callable[[nn.Linear], nn.Module]:
    from oftfx.formats.bnb4 import make_linear4bit

    return lambda linear: make_linear4bit(linear, **kwargs)


def bnb8(linear: nn.Linear) -> nn.Module:
    from oftfx.formats.bnb8 import make_linear8bit

    return make_linear8bit(linear)


def gptq(**kwargs: Any) -> Callable[[nn.Linear], nn.Module]:
    from oftfx.formats.gptq import make_gptq

    return lambda linear: make_gptq(linear, **{"group_size": 32, **kwargs})


def awq(**kwargs: Any) -> Callable[[nn.Linear], nn.Module]:
    from oftfx.formats.awq import make_awq

    return lambda linear: make_awq(linear, **{"group_size": 32, **kwargs})


def hqq(nbits: float = 4, axis: int = 1, group: int = 64, dtype: torch.dtype = torch.float32) -> Any:
    from oftfx.formats.hqq import make_hqq

    return lambda linear: make_hqq(linear.to(dtype), nbits=nbits, axis=axis, group_size=group)


def aqlm(books: int, bits: int, wide: int, high: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    from oftfx.formats.aqlm import make_aqlm

    return lambda linear: make_aqlm(
        linear.to(dtype), num_codebooks=books, nbits=bits, in_group_size=wide, out_group_size=high
    )


def torchao(kind: str, group: int | None = None, bits: int = 4, **kwargs: Any) -> Callable[[nn.Linear], nn.Module]:
    from oftfx.formats.torchao import make_torchao

    def make(linear: nn.Linear) -> nn.Module:
        import torchao.quantization as tq
        from torchao.quantization.quant_primitives import MappingType

        cut = {None: tq.PerAxis(0), 0: tq.PerTensor()}.get(group) or tq.PerGroup(group)
        if kind == "float8":
            cut = tq.PerTensor() if group == 0 else tq.PerRow()
            return make_torchao(linear, tq.Float8WeightOnlyConfig(granularity=cut, **kwargs))
        if kind == "int8":
            cut = tq.PerRow() if group is None else cut
            return make_torchao(linear, tq.Int8WeightOnlyConfig(granularity=cut))
        if kind == "asymmetric":
            kwargs["mapping_type"] = MappingType.ASYMMETRIC
        config = tq.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=cut, **kwargs)
        return make_torchao(linear, config)

    return make


def inc(order: bool = False, **kwargs: Any) -> Callable[[nn.Linear], nn.Module]:
    from oftfx.formats.inc_woq import make_inc_woq

    def make(linear: nn.Linear) -> nn.Module:
        generator = torch.Generator().manual_seed(3)
        permutation = torch.randperm(linear.in_features, generator=generator) if order else None
        return make_inc_woq(linear, permutation=permutation, **kwargs)

    return make


def inc_fp8(**kwargs: Any) -> Callable[[nn.Linear], nn.Module]:
    from oftfx.formats.inc_fp8 import make_patched_linear

    return lambda linear: make_patched_linear(linear, **kwargs)


def fp8(**kwargs: Any) -> Callable[[nn.Linear], nn.Module]:
    from oftfx.formats.hf_fp8 import make_fp8_linear

    return lambda linear: make_fp8_linear(linear, **kwargs)


def compressed(**kwargs: Any) -> Callable[[nn.Linear], nn.Module]:
    from oftfx.formats.compressed_tensors import make_compressed

    return lambda linear: make_compressed(linear, **kwargs)


def quanto(kind: str) -> Callable[[nn.Linear], nn.Module]:
    from oftfx.formats.quanto import make_quanto

    return lambda linear: make_quanto(linear, kind)


def eetq(dtype: torch.dtype = torch.float32) -> Callable[[nn.Linear], nn.Module]:
    from oftfx.formats.eetq import make_eetq

    return lambda linear: make_eetq(linear).to(dtype)


HALF = 5e-4  # products that a layer rounds to float16, and an operator does not
GROUPED = (20, 21, 20)  # the standard has blocks from opset 21 on
INT4 = (20, 21, 20)
BLOCKS = (21, 21, 20)
MXFP4 = {"num_bits": 4, "group_size": 32, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
TWO, FOUR, NF4, ONE = 256 * 4 * 2, 256 * 2 * 2, 256 * 2 * 4, 256 * 8 * 2  # tables in float16, but for NF4

CASES = {
    "nf4": case("bitsandbytes", bnb(), "bnb4 table table", group=64, table=NF4),
    "fp4": case("bitsandbytes", bnb(quant_type="fp4"), "bnb4 table table", group=64, table=NF4),
    "nf4 double": case("bitsandbytes", bnb(double_quant=True), "bnb4 table table", group=64, table=NF4),
    "bnb8": case("bitsandbytes", bnb8, "nbits dq nbits", bits=8),
    # GPTQ: 3 bits take 4 in the file, 5 take 8.
    "gptq 2": case(
        "gptqmodel", gptq(bits=2), "nbits tables nbits", bits=2, group=32, scale=2, zero=0.25, table=TWO, bound=HALF
    ),
    "gptq 3": case("gptqmodel", gptq(bits=3), "nbits dq nbits", opset=INT4, group=32, scale=2, zero=0.5, bound=HALF),
    "gptq 4 act-order": case(
        *("gptqmodel", gptq(desc_act=True), "nbits dq nbits", INT4),
        group=32,
        scale=2,
        zero=0.5,
        ordered=True,
        bound=HALF,
    ),
    "gptq 4 symmetric": case(
        "gptqmodel", gptq(sym=True, group_size=64), "nbits dq nbits", opset=INT4, group=64, scale=2, bound=HALF
    ),
    "gptq 5": case(
        "gptqmodel", gptq(bits=5), "nbits dq nbits", opset=GROUPED, bits=8, group=32, scale=2, zero=1, bound=HALF
    ),
    "gptq 8 rows": case(
        "gptqmodel", gptq(bits=8, sym=True, group_size=-1), "nbits dq nbits", bits=8, scale=2, bound=HALF
    ),
    "awq": case("gptqmodel", awq(), "nbits dq nbits", opset=INT4, group=32, scale=2, zero=0.5, bound=HALF),
    "autoawq": case(
        "awq", awq(kernel="WQLinear_GEMM"), "nbits dq nbits", opset=INT4, group=32, scale=2, zero=0.5, bound=HALF
    ),
    "hqq 4": case("hqq", hqq(), "nbits table nbits", group=64, zero=4, table=FOUR),
    "hqq 3": case("hqq", hqq(3), "nbits table nbits", group=64, zero=4, table=FOUR),
    "hqq 2": case("hqq", hqq(2), "nbits table nbits", bits=2, group=64, zero=4, table=TWO),
    "hqq 1.58": case("hqq", hqq(1.58), "nbits table nbits", bits=2, group=64, zero=4, table=TWO),
    "hqq 1": case("hqq", hqq(1), "table table table", bits=1, group=64, zero=4, table=ONE),
    "hqq 8": case("hqq", hqq(8), "cast cast cast", bits=8, group=64, zero=4),
    "hqq 5": case("hqq", hqq(5), "cast cast cast", bits=8, group=64, zero=4),
    "hqq 4 axis 0": case("hqq", hqq(axis=0), "table table table", group=64, zero=4, table=FOUR),
    "hqq 3 axis 0": case("hqq", hqq(3, axis=0), "table table table", group=64, zero=4, table=FOUR),
    "hqq 8 axis 0": case("hqq", hqq(8, axis=0), "cast cast cast", bits=8, group=64, zero=4),
    "hqq groups of 48": case("hqq", hqq(group=48), "nbits table table", group=48, zero=4, table=FOUR, sizes=THREES),
    "hqq groups of 24": case("hqq", hqq(group=24), "table table table", group=24, zero=4, table=FOUR, sizes=THREES),
    "hqq groups over rows": case("hqq", hqq(group=128), "table table table", group=128, zero=4, table=FOUR),
    "hqq float16": case(
        "hqq", hqq(dtype=torch.float16), "nbits table nbits", group=64, scale=2, zero=2, table=FOUR, bound=HALF
    ),
    "aqlm 2x8": case("aqlm", aqlm(2, 8, 8), "books books books", bits=2),
    "aqlm 2x6 tiles": case("aqlm", aqlm(2, 6, 4, 2), "books books books", bits=2, scale=2),
    "aqlm 1x10": case("aqlm", aqlm(1, 10, 8), "books books books", bits=2),
    "aqlm float16": case(
        "aqlm", aqlm(2, 6, 4, dtype=torch.float16), "books books books", bits=4, scale=2, bound=HALF
    ),
    "torchao int8": case("torchao", torchao("int8"), "nbits dq nbits", bits=8),
    "torchao int8 groups": case("torchao", torchao("int8", 32), "nbits dq nbits", opset=GROUPED, bits=8, group=32),
    "torchao int8 one scale": case("torchao", torchao("int8", 0), "nbits dq nbits", bits=8),
    "torchao int4": case("torchao", torchao("symmetric", 32), "nbits dq nbits", opset=INT4, group=32),
    "torchao int4 zeros": case("torchao", torchao("asymmetric", 32), "nbits dq nbits", opset=INT4, group=32, zero=0.5),
    "torchao int4 rows with zeros": case(
        "torchao", torchao("asymmetric"), "nbits dq nbits", opset=INT4, zero=0.5
    ),
    "torchao int4 groups of 24": case(
        "torchao", torchao("symmetric", 24), "dq dq table", opset=BLOCKS, group=24, table=FOUR, sizes=THREES
    ),
    "torchao int4 groups of 96": case(
        "torchao", torchao("symmetric", 96), "nbits dq nbits", INT4, group=96, sizes=THREES
    ),
    "torchao int2": case("torchao", torchao("symmetric", 32, 2), "nbits table nbits", bits=2, group=32, table=TWO),
    "torchao int1": case(
        "torchao", torchao("asymmetric", 32, 1), "tables tables tables", bits=1, group=32, zero=0.125, table=ONE
    ),
    "torchao int6": case("torchao", torchao("symmetric", 32, 6), "nbits dq nbits", opset=GROUPED, bits=8, group=32),
    "torchao float8": case("torchao", torchao("float8"), "dq dq dq", bits=8),
    "torchao float8 one scale": case("torchao", torchao("float8", 0), "dq dq dq", bits=8, scale=0),
    "torchao e5m2": case("torchao", torchao("float8", weight_dtype=torch.float8_e5m2), "dq dq dq", bits=8),
    "inc 4": case(
        "neural_compressor", inc(), "nbits dq nbits", opset=INT4, group=64, scale=2, zero=0.5, bound=HALF
    ),
    "inc 4 act-order": case(
        *("neural_compressor", inc(order=True), "nbits dq nbits", INT4),
        group=64,
        scale=2,
        zero=0.5,
        ordered=True,
        bound=HALF,
    ),
    "inc 8": case(
        "neural_compressor", inc(bits=8), "nbits dq nbits", opset=GROUPED, bits=8, group=64, scale=2, zero=1, bound=HALF
    ),
    "inc nf4": case("neural_compressor", inc(dtype="nf4"), "bnb4 table table", group=64, table=NF4),
    "inc fp4": case("neural_compressor", inc(dtype="fp4"), "bnb4 table table", group=64, table=FOUR),
    "inc e2m1": case("neural_compressor", inc(dtype="fp4_e2m1"), "table table table", group=64, table=NF4),
    "inc fp8": case("neural_compressor", inc_fp8(), "dq dq values", bits=8, scale=0, table=1024),
    "inc fp8 rows": case(
        *("neural_compressor", inc_fp8(scale_method="act_maxabs_pow2_weights_pcs_maxabs_pow2"), "dq dq dq"),
        bits=8,
        scale=2,
    ),
    "fp8 blocks": case("transformers", fp8(block_size=(64, 32)), "dq dq dq", opset=(21, 21, 21), bits=8, group=2048),
    "fp8 one scale": case("transformers", fp8(block_size=None), "dq dq dq", bits=8, scale=0),
    "compressed int4": case(
        "compressed_tensors", compressed(num_bits=4, group_size=32), "nbits dq nbits", opset=INT4, group=32
    ),
    "compressed int4 zeros": case(
        *("compressed_tensors", compressed(num_bits=4, group_size=32, symmetric=False), "nbits dq nbits", INT4),
        group=32,
        zero=0.5,
    ),
    "compressed int8 rows": case(
        "compressed_tensors", compressed(num_bits=8, strategy="channel"), "nbits dq nbits", bits=8
    ),
    "compressed float8 rows": case(
        "compressed_tensors", compressed(num_bits=8, type="float", strategy="channel"), "dq dq dq", bits=8
    ),
    "compressed mxfp4": case(
        *("compressed_tensors", compressed(type="float", **MXFP4), "table table table"), group=32, scale=2, table=FOUR
    ),
    "quanto int8": case("optimum.quanto", quanto("qint8"), "nbits dq nbits", bits=8),
    "quanto int4": case(
        "optimum.quanto", quanto("qint4"), "nbits table nbits", group=128, zero=4, table=FOUR, sizes=(256, 384, 64)
    ),
    "quanto float8": case("optimum.quanto", quanto("qfloat8"), "dq dq dq", bits=8),
    "eetq": case("transformers", eetq(), "nbits dq nbits", bits=8, scale=2),
    "eetq float16": case("transformers", eetq(torch.float16), "nbits dq nbits", bits=8, scale=2, bound=HALF),
}  # fmt: skip

RAGGED: dict[str, tuple[Case, tuple[int, int, int]]] = {
    "nf4": (CASES["nf4"], (99, 35, 7)),
    "bnb8": (CASES["bnb8"], (33, 5, 3)),
    "gptq": (case("gptqmodel", gptq(desc_act=True), "nbits dq nbits", INT4, ordered=True, bound=HALF), (100, 64, 33)),
    "gptq 3": (case("gptqmodel", gptq(bits=3), "nbits dq nbits", opset=INT4, bound=HALF), (96, 40, 25)),
    "torchao int4": (case("torchao", torchao("symmetric", 11), "dq dq table", opset=BLOCKS), (99, 33, 5)),
    "inc": (case("neural_compressor", inc(group_size=28), "dq dq tables", opset=BLOCKS, bound=HALF), (99, 45, 7)),
    "inc blocks": (case("neural_compressor", inc(), "nbits dq nbits", opset=INT4, bound=HALF), (100, 70, 5)),
    "fp8": (case("transformers", fp8(), "dq dq cast", opset=BLOCKS), (200, 136, 72)),
    "aqlm": (case("aqlm", aqlm(2, 4, 2), "books books books"), (72, 34, 5)),
}
"""Sizes at which groups, blocks and bytes do not end with the rows."""


def marks(found: Case, dialect: str) -> list[Any]:
    """The packages a test needs; a file for OpenVINO also runs there."""
    return [pytest.mark.needs(found.package, *(["openvino"] if dialect == "openvino" else []))]


def network(found: Case, sizes: tuple[int, int, int]) -> nn.Sequential:
    """Two layers, the first with a bias, and a ReLU between them."""
    torch.manual_seed(1)
    first, second = nn.Linear(sizes[0], sizes[1]), nn.Linear(sizes[1], sizes[2], bias=False)
    return nn.Sequential(found.make(first), nn.ReLU(), found.make(second)).eval()
