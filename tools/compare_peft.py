"""PEFT's OFT and oftfx in one process on the same weights, inputs and rotations, each against a float64 reference.

    .venv/bin/python tools/compare_peft.py [--only TEXT] [--out FILE]

Every figure is a relative Frobenius error unless its name says otherwise; an exception is reported by its class.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import peft
import torch
import torch.nn as nn
from peft.tuners.oft.layer import OFTLayer, OFTRotationModule
from torch.utils.flop_counter import FlopCounterMode

import oftfx
import oftfx.rotation.module
from oftfx import OFT
from oftfx.report.rich_table import render

sys.path.insert(0, str(Path(__file__).parents[1]))  # the references are the tests' own
from tests.dense_layers import clipped, dense_conv2d, dense_embedding, dense_linear
from tests.reference import dense_rotation, rel


class Tied(nn.Module):
    """An embedding and a head that are one Parameter, as in most small language models."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(13, 16), nn.Linear(16, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


def one(make, **settings):
    """Build a model of one layer, the same at every call; ``dtype`` and ``memory_format`` as for ``.to``."""
    moved = {k: settings.pop(k) for k in ("dtype", "memory_format") if k in settings}

    def build():
        torch.manual_seed(0)
        return nn.Sequential(make(**settings)).to(**moved).eval()

    return build


def identity(size):
    """One Linear that hands its input on, so that its output shows the rotation."""

    def build():
        model = nn.Sequential(nn.Linear(size, size, bias=False))
        nn.init.eye_(model[0].weight)
        return model.eval()

    return build


def tied():
    torch.manual_seed(0)
    return Tied().eval()


def gpt2_layer():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    return nn.Sequential(Conv1D(24, 16)).eval()


def nf4_layer():
    from oftfx.passes.formats.bnb4 import make_linear4bit

    torch.manual_seed(0)
    linear = nn.Linear(256, 256, bias=False)
    nn.init.normal_(linear.weight, std=0.05)  # as trained weights are, and as NF4 expects
    return nn.Sequential(make_linear4bit(linear)).eval()


def noise(*shape, **moved):
    return lambda: (torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(**moved),)


def tokens():
    return (torch.arange(12).view(2, 6),)


class Peft:
    """PEFT's side: what a comparison does, in PEFT's words."""

    name, transforms = "PEFT", (OFTRotationModule, "_cayley_batch")

    def __init__(self, case, base=None):
        self.case = case
        self.config = {"target_modules": [case.target], "oft_block_size": 4, **case.config}
        base = copy.deepcopy(case.build() if base is None else base)
        self.model = peft.get_peft_model(base, peft.OFTConfig(**self.config)).eval()

    def skews(self, adapter="default"):
        return [p for n, p in self.model.named_parameters() if "oft_" in n and f".{adapter}." in n]

    def add(self, adapter):
        self.model.add_adapter(adapter, peft.OFTConfig(**self.config))

    def activate(self, *adapters):
        self.model.base_model.set_adapter(list(adapters))

    def folded(self):
        return copy.deepcopy(self.model).merge_and_unload()

    def fold(self):
        self.model.merge_adapter()

    def unfold(self):
        self.model.unmerge_adapter()

    def layer(self):
        return self.model.get_submodule(f"base_model.model.{self.case.target}").get_base_layer()

    def scale(self, factor):
        for module in self.model.modules():
            if isinstance(module, OFTLayer):
                module.set_scale("default", factor)

    def to_lora(self):
        peft.convert_to_lora(self.model, rank=4)

    def save(self, path):
        self.model.save_pretrained(path)

    def load(self, path):
        return peft.PeftModel.from_pretrained(self.case.build(), path).eval()

    def export(self, path, inputs):
        torch.onnx.export(self.model, inputs, str(path), dynamo=True, verbose=False)


class Oftfx:
    """Our side, in our words."""

    name, transforms = "oftfx", (oftfx.rotation.module, "cayley")

    def __init__(self, case, base=None):
        self.case = case
        self.model = oftfx.transform(case.build() if base is None else base, {case.target: case.spec}).eval()

    def skews(self, adapter="default"):
        return oftfx.adapter_parameters(self.model, adapter)

    def add(self, adapter):
        oftfx.add_adapter(self.model, adapter, {self.case.target: self.case.spec})

    def activate(self, *adapters):
        oftfx.set_adapter(self.model, adapters)

    def folded(self):
        return oftfx.fold(self.model).model

    def fold(self):
        self.result = oftfx.fold(self.model, quantized="requantize", inplace=True)

    def unfold(self):
        oftfx.unfold(self.result)

    def layer(self):
        return self.model.get_submodule(self.case.target)

    def scale(self, factor):
        with torch.no_grad():
            for skew in self.skews():
                skew.mul_(factor)

    def to_lora(self):
        oftfx.convert_to_lora(self.model, rank=4)

    def save(self, path):
        oftfx.save_adapter(self.model, path)

    def load(self, path):
        return oftfx.load_adapter(self.case.build(), path).eval()

    def export(self, path, inputs):
        oftfx.export_onnx(self.model, path, inputs)


SIDES = (Peft, Oftfx)
OTHER = {Peft: Oftfx, Oftfx: Peft}


def attempt(function, *arguments):
    """The figure, or the class of the exception it ended in."""
    try:
        return function(*arguments)
    except Exception as error:
        return type(error).__name__


@torch.no_grad()
def fill(side, *adapters, std=0.1):
    """The same random skews on both sides, wherever their shapes agree."""
    for seed, adapter in enumerate(adapters or ("default",)):
        for skew in side.skews(adapter):
            skew.copy_(torch.randn(skew.shape, generator=torch.Generator().manual_seed(seed)) * std)


def blocks_of(case, skew, length):
    """The dense rotation of a skew, whose block size is read from its shape."""
    size = math.isqrt(2 * skew.shape[1]) + 1
    assert size * (size - 1) == 2 * skew.shape[1]
    spec = case.spec
    skew = skew if spec.coft_eps is None else clipped(skew, spec.coft_eps)
    return dense_rotation(skew, size, length // size, parameterization=spec.parameterization, terms=spec.terms)


def expected(case, base, inputs, *skews):
    """The output in float64, from the definition."""
    layer = base.get_submodule(case.target)
    if isinstance(base, Tied):  # rotating what the head reads, or what the embedding gives, is the same
        rotation = blocks_of(case, skews[0], 16)
        return dense_embedding(base.embed, rotation, *inputs) @ base.embed.weight.detach().double().T
    if isinstance(layer, nn.Conv2d):
        size = math.isqrt(2 * skews[0].shape[1]) + 1
        length = layer.weight[0].numel() if case.spec.block_share else skews[0].shape[0] * size
        dense = dense_conv2d
    elif isinstance(layer, nn.Embedding):
        length, dense = layer.embedding_dim, dense_embedding
    else:
        length, dense = inputs[0].shape[-1], dense_linear
    rotation = torch.eye(length, dtype=torch.float64)
    for skew in skews:
        rotation = rotation @ blocks_of(case, skew, length)
    return dense(layer, rotation, *inputs)


def each(measure):
    """A measurement of one side, as one of both."""

    def both(case):
        results = {}
        for kind in SIDES:
            with warnings.catch_warnings():
                if kind is Peft:
                    warnings.simplefilter("ignore")
                try:
                    with torch.no_grad():
                        results[kind.name] = measure(case, kind)
                except Exception as error:
                    results[kind.name] = {"insert": type(error).__name__}
        return results

    both.__name__ = measure.__name__
    return both


@each
def errors(case, kind):
    """Output at skew 0 against the base; output and folded output at random skews against the reference."""
    base, inputs = case.build(), case.inputs()
    side = kind(case)
    figures = {"identity": attempt(lambda: rel(side.model(*inputs), base(*inputs)))}
    fill(side, std=case.std)
    skews = [s.clone() for s in side.skews()]
    figures["forward"] = attempt(lambda: rel(side.model(*inputs), expected(case, base, inputs, *skews)))
    figures["folded"] = attempt(lambda: rel(side.folded()(*inputs), expected(case, base, inputs, *skews)))
    return figures


@each
def two_adapters(case, kind):
    """x -> R1 -> R2 -> W."""
    base, inputs, side = case.build(), case.inputs(), kind(case)
    side.add("second")
    fill(side, "default", "second", std=case.std)
    side.activate("default", "second")
    wanted = expected(case, base, inputs, *side.skews(), *side.skews("second"))
    return {
        "forward": attempt(lambda: rel(side.model(*inputs), wanted)),
        "folded": attempt(lambda: rel(side.folded()(*inputs), wanted)),
    }


@each
def dropped(case, kind):
    """Blocks that the output of an identity weight shows to be the identity, of 20 training forwards."""
    side, size = kind(case), 4
    fill(side)
    (eye,) = case.inputs()

    def share():
        rotation = side.model(eye)
        blocks = torch.stack([rotation[i : i + size, i : i + size] for i in range(0, len(eye), size)])
        return float((blocks == torch.eye(size)).all(-1).all(-1).double().mean())

    in_eval = share()
    side.model.train()
    return {"blocks replaced in training": statistics.mean(share() for _ in range(20)), "in eval": in_eval}


@each
def parameter_changes(case, kind):
    """What an eval forward does to the parameter, beside its output."""
    base, inputs, side = case.build(), case.inputs(), kind(case)
    fill(side, std=case.std)
    (skew,) = side.skews()
    before = skew.clone()
    error = attempt(lambda: rel(side.model(*inputs), expected(case, base, inputs, before)))
    return {"parameter changed": rel(skew, before), "forward": error}


@each
def tie(case, kind):
    """Fold one of two layers that share their weight."""
    base, inputs, side = case.build(), case.inputs(), kind(case)
    fill(side, std=case.std)
    wanted = expected(case, base, inputs, *side.skews())
    other = {"head": "embed", "embed": "head"}[case.target]
    forward, folded = attempt(lambda: rel(side.model(*inputs), wanted)), side.folded()
    return {
        "forward": forward,
        "folded": rel(folded(*inputs), wanted),
        f"{other} changed": rel(folded.get_submodule(other).weight, base.embed.weight),
    }


@each
def half(case, kind):
    """Half as strong a rotation."""
    base, inputs, side = case.build(), case.inputs(), kind(case)
    fill(side, std=case.std)
    skews = [s / 2 for s in side.skews()]

    def scaled():
        side.scale(0.5)
        return rel(side.model(*inputs), expected(case, base, inputs, *skews))

    return {"forward at half the skew": attempt(scaled)}


@each
def drift(case, kind):
    """The weight after folding and unfolding n times."""
    side = kind(case)
    fill(side, std=case.std)
    before, figures = stored(side.layer()), []
    for _ in range(5):
        side.fold()
        side.unfold()
        figures.append(rel(stored(side.layer()), before))
    return {"n = 1 to 5:": figures}


def stored(layer):
    """The weight of a layer as its own package reads it."""
    if hasattr(layer.weight, "quant_state"):
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.detach().clone()


def cost(case, rounds=5):
    """Fold and unfold one layer, both sides in turn: median seconds, and operations of the products."""
    sides = {kind.name: kind(case) for kind in SIDES}
    times = {name: {"fold": [], "unfold": []} for name in sides}
    operations = {}
    with torch.no_grad():
        for side in sides.values():
            fill(side, std=case.std)
        for round_ in range(rounds + 1):
            for name, side in sides.items():
                for what in ("fold", "unfold"):
                    start = time.perf_counter()
                    getattr(side, what)()
                    if round_:
                        times[name][what].append(time.perf_counter() - start)
        for name, side in sides.items():
            with FlopCounterMode(display=False) as counter:
                side.fold()
            operations[name] = counter.get_total_flops()
            side.unfold()
    figures = {}
    for name, measured in times.items():
        seconds = {f"{what} (s)": statistics.median(t) for what, t in measured.items()}
        figures[name] = {**seconds, "fold (GFLOP)": operations[name] / 1e9}
    ratio = figures["PEFT"]["fold (s)"] / figures["oftfx"]["fold (s)"]
    figures["oftfx"]["PEFT's time / ours, fold"] = ratio
    return figures


@each
def recomputed(case, kind):
    """How often R is computed."""
    side, inputs = kind(case), case.inputs()
    fill(side, std=case.std)
    owner, name = kind.transforms
    with mock.patch.object(owner, name, autospec=True, side_effect=getattr(owner, name)) as counted:
        for _ in range(10):
            side.model(*inputs)
    return {"Cayley transforms in 10 eval forwards": counted.call_count}


@each
def onnx(case, kind):
    """The exported file in ONNX Runtime, rotation unfolded."""
    base, inputs, side = case.build(), case.inputs(), kind(case)
    fill(side, std=case.std)

    def exported():
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            side.export(path, inputs)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            (out,) = session.run(None, {session.get_inputs()[0].name: inputs[0].numpy()})
        return rel(torch.from_numpy(out), expected(case, base, inputs, *side.skews()))

    return {"ONNX Runtime": attempt(exported)}


@each
def block_size(case, kind):
    """What an indivisible block size becomes."""
    (skew,) = kind(case).skews()
    return {"block size used": math.isqrt(2 * skew.shape[1]) + 1}


@each
def lora(case, kind):
    side = kind(case)
    return {"convert to LoRA": attempt(side.to_lora)}


@each
def files(case, kind):
    """Each side reads what the other wrote."""
    base, inputs, other = case.build(), case.inputs(), OTHER[kind](case)
    fill(other, std=case.std)
    with tempfile.TemporaryDirectory() as folder:
        other.save(folder)
        model = kind.load(mock.Mock(case=case), folder)
    return {f"{other.name}'s file": rel(model(*inputs), expected(case, base, inputs, *other.skews()))}


PLAIN = OFT(4)


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: the row.
        build: makes the base model; the same one at every call.
        inputs: makes its input.
        measure: both sides' figures.
        config: fields of PEFT's `OFTConfig` besides target and block size 4.
        spec: ours, with the same meaning.
        target: path of the adapted layer.
        std: of the random skews.
        brief: whether the README shows the row too.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    measure: Callable[[Case], dict[str, dict[str, float | str]]] = errors
    config: dict = field(default_factory=dict)
    spec: OFT = PLAIN
    target: str = "0"
    std: float = 0.1
    brief: bool = True


def conv(**settings):
    return one(nn.Conv2d, **{"in_channels": 8, "out_channels": 6, **settings})


IMAGE = noise(2, 8, 12, 12)
EXACT = {"use_cayley_neumann": False}
LAST = {"memory_format": torch.channels_last}
HALF = {"dtype": torch.bfloat16}
LINEAR = one(nn.Linear, in_features=16, out_features=10)
EMBEDDING = one(nn.Embedding, num_embeddings=13, embedding_dim=16)
WIDE = one(nn.Linear, in_features=2048, out_features=2048, bias=False)

CASES = (
    Case("Conv2d k=3", conv(kernel_size=3), IMAGE),
    Case("Conv2d k=3, padding 1, stride 2", conv(kernel_size=3, padding=1, stride=2), IMAGE),
    Case("Conv2d k=4, stride 4", conv(kernel_size=4, stride=4), IMAGE),
    Case("Conv2d k=7, padding 3", conv(kernel_size=7, padding=3), IMAGE),
    Case("Conv2d kernel (1, 3)", conv(kernel_size=(1, 3)), IMAGE),
    Case(
        "Conv2d k=3, groups 4",
        conv(kernel_size=3, groups=4, out_channels=8),
        IMAGE,
        config={"oft_block_size": 6},
        spec=OFT(6),
    ),
    Case("Conv2d k=1, groups 2", conv(kernel_size=1, groups=2), IMAGE),
    Case("Conv2d k=3, channels_last", conv(kernel_size=3, **LAST), noise(2, 8, 12, 12, **LAST)),
    Case("Conv2d k=1, channels_last", conv(kernel_size=1, **LAST), noise(2, 8, 12, 12, **LAST), brief=False),
    Case("Conv2d k=1, unbatched", conv(kernel_size=1), noise(8, 12, 10)),
    Case("Conv2d k=1, unbatched, width = channels", conv(kernel_size=1), noise(8, 12, 8)),
    Case("Conv2d k=3, dilation (1, 2)", conv(kernel_size=3, dilation=(1, 2)), IMAGE),
    Case("Conv2d k=3, dilation 2", conv(kernel_size=3, dilation=2), IMAGE),
    *(
        Case(
            f"Conv2d k=3, padding_mode {mode}",
            conv(kernel_size=3, padding=2, padding_mode=mode),
            IMAGE,
            brief=mode == "circular",
        )
        for mode in ("reflect", "circular", "replicate")
    ),
    Case("Conv2d k=3, bfloat16", conv(kernel_size=3, **HALF), noise(2, 8, 12, 12, **HALF)),
    Case("Linear, 4-D input", LINEAR, noise(2, 3, 5, 16)),
    Case("Linear, two adapters at once", LINEAR, noise(7, 16), two_adapters, std=0.3),
    Case("Conv2d k=1, two adapters at once", conv(kernel_size=1), IMAGE, two_adapters, std=0.3, brief=False),
    Case("Embedding, two adapters at once", EMBEDDING, tokens, two_adapters, std=0.3, brief=False),
    Case(
        "dropout 0.9", identity(512), lambda: (torch.eye(512),), dropped, {"module_dropout": 0.9}, OFT(4, dropout=0.9)
    ),
    Case(
        "COFT, one eval forward",
        LINEAR,
        noise(7, 16),
        parameter_changes,
        {"coft": True, "eps": 0.2},
        OFT(4, coft_eps=0.2),
        std=0.5,
    ),
    Case("tied weights, adapter on the head", tied, tokens, tie, target="head", std=0.3),
    Case("tied weights, adapter on the embedding", tied, tokens, tie, target="embed", std=0.3),
    Case("GPT-2 Conv1D", gpt2_layer, noise(7, 16), config={"fan_in_fan_out": True}),
    Case("scale to a half (ours: halve the skew)", LINEAR, noise(7, 16), half),
    Case("fold and unfold n times, float32", one(nn.Linear, in_features=256, out_features=256), noise(7, 256), drift),
    Case(
        "fold and unfold n times, bfloat16",
        one(nn.Linear, in_features=256, out_features=256, **HALF),
        noise(7, 256),
        drift,
    ),
    Case("fold and unfold n times, NF4", nf4_layer, noise(7, 256), drift, {"oft_block_size": 32}, OFT(32), std=0.02),
    Case("cost of a fold, Linear 2048x2048", WIDE, noise(1, 2048), cost, {"oft_block_size": 32}, OFT(32), std=0.02),
    Case("eval: how often R is computed, Linear", LINEAR, noise(7, 16), recomputed),
    Case("eval: how often R is computed, Conv2d k=1", conv(kernel_size=1), IMAGE, recomputed, brief=False),
    Case("ONNX, Cayley-Neumann, unfolded", LINEAR, noise(7, 16), onnx, brief=False),
    Case("ONNX, exact Cayley, unfolded", LINEAR, noise(7, 16), onnx, EXACT, OFT(4, parameterization="cayley")),
    Case(
        "block size 32 asked, in_features 53",
        one(nn.Linear, in_features=53, out_features=10),
        noise(7, 53),
        block_size,
        {"oft_block_size": 32},
        OFT(32),
    ),
    Case(
        "in_features 53, nearest block size",
        one(nn.Linear, in_features=53, out_features=10),
        noise(7, 53),
        config={"oft_block_size": 32},
        spec=OFT(32, on_indivisible="nearest"),
        std=0.02,
        brief=False,
    ),
    Case("convert to LoRA", LINEAR, noise(7, 16), lora, brief=False),
    Case("Linear", LINEAR, noise(2, 5, 16)),
    Case(
        "Linear, exact Cayley",
        LINEAR,
        noise(2, 5, 16),
        config=EXACT,
        spec=OFT(4, parameterization="cayley"),
        brief=False,
    ),
    Case("Conv2d k=1", conv(kernel_size=1), IMAGE),
    Case("Conv2d k=1, bfloat16", conv(kernel_size=1, **HALF), noise(2, 8, 12, 12, **HALF), brief=False),
    Case("Conv2d k=1, stride 2", conv(kernel_size=1, stride=2), IMAGE, brief=False),
    Case("Conv2d, kernel as large as the input", conv(kernel_size=5), noise(2, 8, 5, 5)),
    Case("Embedding", EMBEDDING, tokens),
    Case("Conv2d k=1, files", conv(kernel_size=1), IMAGE, files),
    Case("Conv2d, kernel as large as the input, files", conv(kernel_size=5), noise(2, 8, 5, 5), files),
    Case("Embedding, files", EMBEDDING, tokens, files),
)


def cell(figures):
    """``identity 0, forward 1.2e-07``; an exception that is the same everywhere stands alone."""
    texts = {name: shown(value) for name, value in figures.items()}
    if len(set(texts.values())) == 1 and all(isinstance(v, str) for v in figures.values()):
        return next(iter(texts.values()))
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def shown(value):
    if isinstance(value, list):
        return " ".join(map(shown, value))
    return value if isinstance(value, str) else f"{value:.2g}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--out", type=Path, help="default: tools/results/compare_peft.json, if all rows are run")
    options = parser.parse_args()
    rows = []
    for case in CASES:
        if options.only.lower() in case.name.lower():
            figures = case.measure(case)
            cells = {name: cell(f) for name, f in figures.items()}
            rows.append({"case": case.name, **cells, "brief": case.brief, "figures": figures})
            print(f"{len(rows)} {case.name}", file=sys.stderr)
    title = f"PEFT {peft.__version__} and oftfx {oftfx.__version__}, torch {torch.__version__}, CPU"
    print(render(title, ("case", "PEFT", "oftfx"), [(r["case"], r["PEFT"], r["oftfx"]) for r in rows]))
    out = options.out or (None if options.only else Path(__file__).parent / "results" / "compare_peft.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        versions = {"peft": peft.__version__, "torch": torch.__version__}
        out.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
