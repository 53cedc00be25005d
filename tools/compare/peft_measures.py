"""What tools/compare/compare_peft.py measures of a case, on both sides, each against a float64 reference.

A measurement gives, for each side, figures by name; where a side cannot do something, the class of its exception.
"""

import math
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from tests.dense_layers import clipped, dense_conv2d, dense_embedding, dense_linear
from tests.reference import dense_rotation, rel
from tools.compare.peft_models import Tied
from tools.compare.peft_sides import OTHER, SIDES, Peft, attempt, fill


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
def files(case, kind):
    """Each side reads what the other wrote."""
    base, inputs, other = case.build(), case.inputs(), OTHER[kind](case)
    fill(other, std=case.std)
    with tempfile.TemporaryDirectory() as folder:
        other.save(folder)
        model = kind.load(mock.Mock(case=case), folder)
    return {f"{other.name}'s file": rel(model(*inputs), expected(case, base, inputs, *other.skews()))}
