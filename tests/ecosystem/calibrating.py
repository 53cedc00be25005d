"""What processes run that calibrate one model together, each on its share of the inputs."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import OftfxError
from oftfx.folding.peers import Peers
from oftfx.folding.policies import Budget
from oftfx.folding.pooled import Pool
from oftfx.folding.same import digests
from oftfx.folding.shown import Shown
from oftfx.passes.quantized import roundings
from tests.ecosystem import processes
from tests.quantized import quantize
from tests.reference import randomize

WIDTH = 32
BUDGET = Budget(error=0.05)
SITES = ("first", "experts.0", "experts.1", "experts.2", "last")
SHARES = {"even": (4, 4), "uneven": (1, 9), "few": (2, 1), "one has all": (5, 0)}


class Routed(nn.Module):
    """Rows go to one of two experts by the sign of their first feature; nothing comes to the third."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 48)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(48, 5)

    def forward(self, x):
        y, out = torch.tanh(self.first(x)), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = (x[..., 0] < 0).long() == number
            if mine.any():
                out[mine] = expert(y[mine])
        return self.head(torch.relu(self.last(out + y)))


def model(std=0.1):
    """With random rotations in front of its quantized layers; the same in every process."""
    torch.manual_seed(7)
    net = Routed()
    for name in SITES:
        holder, _, last = name.rpartition(".")
        setattr(net.get_submodule(holder), last, quantize(net.get_submodule(name)))
    return randomize(oftfx.transform(net, {n: OFT(8) for n in SITES}, example_inputs=inputs(1)[0]), std=std)


def inputs(count, sign=0, tokens=90):
    """Batches; with a sign all of their rows go to one expert."""
    generator = torch.Generator().manual_seed(99)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) @ torch.diag(torch.logspace(0, -1.5, WIDTH)) / 3
    generator.manual_seed(count)
    found = [torch.randn(2, tokens + 5 * i, WIDTH, generator=generator) @ mix for i in range(count)]
    for x in found if sign else ():
        x[..., 0] = sign * x[..., 0].abs()
    return [(x,) for x in found]


def share(batches, counts, rank):
    """Of one process."""
    begin = sum(counts[:rank])
    return batches[begin : begin + counts[rank]]


def everyone(value, world):
    found = [None] * world
    dist.all_gather_object(found, value)
    return found


def folded(rank, world, batches, net=None, **options):
    """A fold of all processes, and what of it differs between them."""
    net = model() if net is None else net
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = oftfx.fold(net, **{"quantized": "calibrate", **options}, calibration=batches, distributed=True)
    tensors, lines = everyone(digests(result.model), world), everyone(result.report.to_json(), world)
    return {"model": result.model, "report": result.report, "same": tensors.count(tensors[0]) == world,
            "same report": lines.count(lines[0]) == world}  # fmt: skip


def shares(counts, **options):
    """Inputs that are shared out so."""

    def job(rank, world):
        return folded(rank, world, share(inputs(sum(counts)), counts, rank), **options)

    return job


def experts_apart(rank, world):
    """Each process reaches one of the experts only; both together none of the third."""
    return folded(rank, world, inputs(4, sign=1 - 2 * rank))


def in_ddp(rank, world):
    """The wrapped model."""
    wrapped = nn.parallel.DistributedDataParallel(model())
    return folded(rank, world, share(inputs(8), (4, 4), rank), wrapped)


def pooled(counts, tokens):
    """What is put together of random rows."""

    def job(rank, world):
        found = []
        with Peers.joined(True) as peers:
            pool, layer = Pool(peers), nn.Linear(6, 2)
            for missed in (False, True):
                x, y = rows(sum(counts), tokens, missed)
                mine = Shown(share(x, counts, rank), share(y, counts, rank))
                whole = pool.of(mine, layer)
                assert pool.of(mine, layer) is whole
                learn, judge = whole.parts
                found.append({
                    "tokens": (whole.tokens, learn.tokens, judge.tokens),
                    "moments": [(s.seen, s.missed) for s in (whole, learn, judge)],
                    "rows": [s.sampled(s.tokens, own=own) for s in (whole, judge) for own in (True, False)],
                    "finite": whole.is_finite(),
                })  # fmt: skip
            assert pool.of(Shown([torch.zeros(3, 6)] * rank, [None] * rank), layer) is None
        bits = everyone([t.numpy().tobytes() for f in found for s in f["moments"] for t in s if t is not None], world)
        return {"found": found, "same": bits.count(bits[0]) == world}

    return job


def rows(count, tokens, missed):
    """What a layer reads in each batch, and what its fellow does."""
    generator = torch.Generator().manual_seed(count)
    x = [torch.randn(tokens + 3 * i, 6, generator=generator) for i in range(count)]
    return x, [a + 0.1 * torch.randn(a.shape, generator=generator) if missed else None for a in x]


def refused(run):
    """The errors of all processes; each of them is whole again afterwards."""

    def job(rank, world):
        net = model()
        before = digests(net)
        try:
            run(rank, net)
            text = "nothing"
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        same = digests(net) == before
        return {"texts": everyone(text if same or run is other_model else f"{text}; the model was changed", world)}

    return job


def fold(net, batches, **options):
    oftfx.fold(net, **{"quantized": "calibrate", **options}, calibration=batches, distributed=True)


def other_model(rank, net):
    with torch.no_grad():
        net.head.bias[2] += rank
    fold(net, inputs(2))


def other_policy(rank, net):
    fold(net, inputs(2), quantized="calibrate" if rank else "requantize")


def no_inputs(rank, net):
    fold(net, [])


def wrong_input(rank, net):
    fold(net, inputs(2) if rank == 0 else [{"y": torch.randn(3, WIDTH)}])


def other_width(rank, net):
    fold(net, inputs(2) if rank == 0 else [(torch.randn(3, WIDTH + 1),)])


def not_finite(rank, net):
    batches = inputs(2)
    batches[1][0][0, 3, 1] = float("nan") if rank else 0.0
    fold(net, batches)


def wrong_argument(rank, net):
    fold(net, inputs(2), **({"adapter": "nobody"} if rank else {}))


def distilled(rank, net):
    fold(net, inputs(8), distil=1)


def sharded(rank, net):
    fold(processes.sharded(True, "blocks"), [processes.data(0)[:1]], inplace=True)


def fails_under_way(rank, net):
    with rounding(rank == 1, fails_at=3):
        fold(net, inputs(2), inplace=True, undo=True)


def interrupted(rank, net):
    try:
        with rounding(rank == 1, fails_at=2, error=KeyboardInterrupt):
            fold(net, inputs(2))
    except KeyboardInterrupt as error:
        raise OftfxError("interrupted") from error


def rounds_otherwise(rank, net):
    with rounding(rank == 1, coarser=True):
        fold(net, inputs(2))


def dies(rank, world):
    """The second process ends; the first one leaves in a file what it was told."""
    end = type("End", (BaseException,), {"__init__": lambda self, _: os._exit(1)})
    try:
        with rounding(rank == 1, fails_at=2, error=end):
            fold(model(), inputs(2))
    except OftfxError as error:
        Path(os.environ[processes.FOLDER]).write_text(str(error))
    return {}


@contextlib.contextmanager
def rounding(here, fails_at=None, error=MemoryError, *, coarser=False):
    """In this process the rounding of some layer fails, or is not that of the others."""
    real, count = roundings.Way.state, [0]

    def state(way, site, shown):
        if site.fqn != SITES[0] and coarser:
            return site.format.requantize(site.target * 1.5, site.module)
        count[0] += way == roundings.CALIBRATED
        if count[0] == fails_at:
            raise error("no room")
        return real(way, site, shown)

    try:
        if here:
            roundings.Way.state = state
        yield
    finally:
        roundings.Way.state = real


REFUSED = (other_model, other_policy, no_inputs, wrong_input, other_width, not_finite, wrong_argument, distilled,
           sharded, fails_under_way, interrupted, rounds_otherwise)  # fmt: skip
JOBS = {
    **{f"calibrates-{name}": shares(counts) for name, counts in SHARES.items()},
    "calibrates-budget": shares((4, 4), quantized=BUDGET),
    "calibrates-experts-apart": experts_apart,
    "calibrates-in-ddp": in_ddp,
    **{f"pools-{sum(counts)}-{tokens}": pooled(counts, tokens) for counts, tokens in (((3, 2), 1), ((2, 7), 400))},
    **{f"refuses-{run.__name__}": refused(run) for run in REFUSED},
}
DYING = {"dies": dies}
THREE = {"pools-three": pooled((1, 0, 4), 500), "calibrates-three": shares((1, 0, 2))}
EVERY = {**JOBS, **THREE, **DYING}
