"""What each of two processes runs, and how they are started.

A job is a function that takes ``(rank, world)`` and returns tensors; rank 0's come back.
"""

from __future__ import annotations

import datetime
import importlib
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

import oftfx
from tests import quantized
from tests.ecosystem.network import Block, base, transformed
from tests.reference import randomize

WORLD = 2
TIMEOUT = 60
STEPS = 3
FOLDER = "OFTFX_TEST_CHECKPOINT"
WAYS = ("requantize", "calibrate")
DTYPES = ("float64", "bfloat16")


def run(names, folder, world=WORLD, module=__name__):
    """Run jobs of a module, one after the other, in gloo processes; ``{name: result or the text of its error}``."""
    context = torch.multiprocessing.get_context("spawn")
    root = str(Path(__file__).parents[2])
    if root not in sys.path:
        sys.path.append(root)  # spawned processes get this list
    made = [(rank, world, names, str(folder), module) for rank in range(world)]
    processes = [context.Process(target=_work, args=each, daemon=True) for each in made]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT * 2
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return {n: torch.load(f, weights_only=False) if (f := Path(folder) / n).exists() else "no result" for n in names}


def _work(rank, world, names, folder, module):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    # A file and no port: nothing to be taken by somebody else in between.
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    for name in names:
        result = _result(module, name, rank, world)
        everyone = [None] * world
        dist.all_gather_object(everyone, result if isinstance(result, str) else "")
        if rank == 0:
            torch.save(next((e for e in everyone if e), result), Path(folder) / name)
    dist.destroy_process_group()


def _result(module, name, rank, world):
    import traceback

    try:
        return importlib.import_module(module).EVERY[name](rank, world)
    except Exception:
        return f"rank {rank}: {traceback.format_exc()}"


def data(step, width=16, dtype=torch.float64):
    """The whole batch of a step."""
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(4, 3, n, generator=generator, dtype=torch.float64).to(dtype) for n in (width, 4))


def train(model, rank=0, world=1, steps=STEPS, first=0, data=data):
    """Losses of the whole batch, each process on its rows; the last gradients stay."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for step in range(first, first + steps):
        x, y = (t.chunk(world)[rank] for t in data(step))
        loss = nn.functional.mse_loss(model(x).double(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / world)
    return losses


def outcome(model, losses, parameters=None, **more):
    """What a test compares."""
    parameters = dict(model.named_parameters()) if parameters is None else parameters
    ours = {n: p.detach().clone() for n, p in parameters.items() if ".oft." in n}
    return {"losses": losses, "skews": ours, **more}


def single(share):
    """One process on the whole batch."""
    model = transformed(share)
    losses = train(model)
    return model, outcome(model, losses, grads={n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def full(model):
    """The gathered state dict of a sharded model, on every rank."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def ddp(share, **options):
    """DistributedDataParallel."""

    def job(rank, world):
        model = transformed(share, std=0.1 * (1 + rank) if options.get("start_apart") else 0.1)
        kwargs = {k: v for k, v in options.items() if k != "start_apart"}
        wrapped = nn.parallel.DistributedDataParallel(model, **kwargs)
        losses = train(wrapped, rank, world)
        apart = torch.stack([p.detach().abs().sum() for p in oftfx.adapter_parameters(wrapped)])
        low, high = apart.clone(), apart.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        folded = oftfx.fold(wrapped).model.state_dict()
        return outcome(model, losses, grads=grads, apart=float((high - low).abs().max()), folded=folded)

    return job


def ddp_accumulates(rank, world):
    """Two micro-batches, the first without communication."""
    model = transformed(True)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for index in range(2):
        x, y = (t.chunk(world)[rank].chunk(2)[index] for t in data(0))
        if index == 0:
            with wrapped.no_sync():
                (nn.functional.mse_loss(wrapped(x), y) / 2).backward()
        else:
            (nn.functional.mse_loss(wrapped(x), y) / 2).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def fsdp2(share, units):
    """``fully_shard`` of every block, of every layer, or of the root alone."""

    def job(rank, world):
        model = sharded(share, units)
        losses = train(model, rank, world)
        grads = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
        return outcome(model, losses, full(model), grads=grads)

    return job


def sharded(share, units, **options):
    """A transformed model, sharded."""
    from torch.distributed.fsdp import fully_shard

    model = transformed(share)
    if units == "blocks":
        for block in model.blocks:
            fully_shard(block, **options)
    elif units == "layers":
        for module in list(model.modules()):
            if isinstance(module, nn.Linear):
                fully_shard(module, **options)
    return fully_shard(model, **options)


def fsdp2_checkpointed(rank, world):
    """Sharded blocks that are computed again in the backward pass."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from torch.distributed.fsdp import fully_shard

    model = transformed(True)
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, Block))
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    losses = train(model, rank, world)
    parameters = {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in full(model).items()}
    return outcome(model, losses, parameters)


def fsdp2_evaluates(rank, world):
    """Eval forwards between steps: outputs of the model as it is then."""
    model = sharded(True, "blocks").eval()
    x = data(7)[0]
    outputs, states = [], []
    for step in range(3):
        train(model, rank, world, 1, step)
        with torch.no_grad():
            outputs.append(model(x))
        states.append({n: p.clone() for n, p in full(model).items()})
    return {"outputs": outputs, "states": states}


def fsdp2_loads(rank, world):
    """Sharded rotations loaded, several times, into a model that has run in eval mode."""
    from torch.distributed.tensor import distribute_tensor

    model, states, outputs = sharded(False, "layers").eval(), [], []
    for seed in range(5):
        other = dict(randomize(transformed(False), std=0.3, seed=seed).named_parameters())
        states.append({
            n: distribute_tensor(other[n].detach(), p.device_mesh, p.placements)
            for n, p in model.named_parameters()
            if ".oft." in n
        })  # fmt: skip
    for state in states:
        model.load_state_dict(state, strict=False)
        with torch.no_grad():
            outputs.append(model(data(7)[0]))
        model.reshard()  # FSDP keeps the root gathered after a forward, and loads only into shards
    return {"outputs": outputs}


def fsdp2_narrow(rank, world):
    """Mixed precision of FSDP: parameters gathered in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = sharded(True, "blocks", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    losses = train(model, rank, world)
    return outcome(model, losses, full(model))


def fsdp2_api(rank, world):
    """The adapter functions on a sharded model."""
    model = sharded(True, "blocks").eval()
    kinds = [type(p).__name__ for p in oftfx.adapter_parameters(model)]
    x = data(7)[0]
    with torch.no_grad():
        with oftfx.disable_adapters(model):
            silent = model(x)
        after = model(x)
    return {"silent": silent, "after": after, "active": oftfx.active_adapters(model), "kinds": kinds}


def fsdp2_folds(units, dtype):
    """A fold of the sharded model itself, right after it has trained and run, against that of the gathered one."""

    def job(rank, world):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
        from torch.distributed.fsdp import fully_shard

        model = transformed(True).to(dtype)
        for unit in {"blocks": model.blocks, "layers": [m for m in model.modules() if isinstance(m, nn.Linear)]}[units]:
            fully_shard(unit)
        fully_shard(model)
        train(model, rank, world, data=partial(data, dtype=dtype))
        x = data(7, dtype=dtype)[0]
        with torch.no_grad():
            before = model(x)  # leaves whole weights behind
        whole = transformed(True).to(dtype)
        set_model_state_dict(whole, full(model), options=StateDictOptions(full_state_dict=True))
        gathered = oftfx.fold(whole)
        result = oftfx.fold(model, inplace=True)
        with torch.no_grad():
            after, again = model(x), model(x)
        lines = [
            [(s.fqn, s.action, s.update, s.energy, s.relative_error, s.survival, s.bytes_before) for s in r.report]
            for r in (result, gathered)
        ]
        return {"before": before, "after": after, "again": again, "lines": lines, "state": full(model),
                "gathered": gathered.model.state_dict()}  # fmt: skip

    return job


def fsdp2_folds_few_rows(rank, world):
    """Fewer rows than processes in one layer, an odd number in another, and no rotation that turns in a third."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(16, 5), nn.Linear(5, 1), nn.Linear(1, 6), nn.Embedding(7, 6))
    rules = {"0": oftfx.OFT(8), "1": oftfx.OFT(5), "2": oftfx.OFT(1), "3": oftfx.OFT(3)}
    model = randomize(oftfx.transform(base, rules), std=0.3)
    whole = oftfx.fold(model)
    fully_shard(model)
    result = oftfx.fold(model, inplace=True)
    lines = [[(s.fqn, s.action) for s in r.report] for r in (result, whole)]
    return {"state": full(model), "whole": whole.model.state_dict(), "lines": lines}


def fsdp2_saves(rank, world):
    """Trains two steps and writes a distributed checkpoint of the model and the optimiser."""
    import torch.distributed.checkpoint as dcp

    model, optimizer = _resumable(rank, world, 0, 2)
    dcp.save(_states(model, optimizer), checkpoint_id=os.environ[FOLDER])
    return {}


def fsdp2_resumes(rank, world):
    """Reads it with any number of processes, and trains a step more."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    model, optimizer = _resumable(rank, world, 7, 1)  # on other data: all of it is replaced
    states = _states(model, optimizer)
    dcp.load(states, checkpoint_id=os.environ[FOLDER])
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    _steps(model, optimizer, rank, world, 2, 1)
    return {"skews": {n: p for n, p in full(model).items() if ".oft." in n}}


def _resumable(rank, world, first, steps):
    model = sharded(True, "blocks")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    _steps(model, optimizer, rank, world, first, steps)
    return model, optimizer


def _steps(model, optimizer, rank, world, first, steps):
    for step in range(first, first + steps):
        x, y = (t.chunk(world)[rank] for t in data(step))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def _states(model, optimizer):
    from torch.distributed.checkpoint.state_dict import get_state_dict

    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


def fsdp2_fold_is_undone(rank, world):
    """With ``undo=True``; and what a copy would need is refused."""
    model = sharded(True, "blocks")
    x, state = data(7)[0], {n: p.clone() for n, p in full(model).items()}
    messages = []
    for options in ({}, {"inplace": True, "into": "producer"}):
        try:
            oftfx.fold(model, **options)
        except oftfx.errors.FoldError as error:
            messages.append(str(error))
    with torch.no_grad():
        before = model(x)
        result = oftfx.fold(model, inplace=True, undo=True)
        oftfx.unfold(result)
        after = model(x)
    now = full(model)
    return {
        "messages": messages,
        "before": before,
        "after": after,
        "same": all(torch.equal(now[n], p) for n, p in state.items()),
    }


def fsdp2_fold_fails_together(rank, world):
    """Rows that are not finite in one process only."""
    model = sharded(False, "blocks")
    local = model.blocks[1].k.weight.to_local()
    if rank == 1:
        with torch.no_grad():
            local[0, 0] = torch.nan
    try:
        oftfx.fold(model, inplace=True)
    except oftfx.errors.FoldError as error:
        texts = [None] * world
        dist.all_gather_object(texts, str(error))
        return {"texts": texts}


def aware(how, wrap=lambda model: model, rank=0, world=1):
    """A quantized network that trains through its fold: NF4 in float32."""
    model = quantized.rotated().train()
    oftfx.fold_aware(model, how, calibration=quantized.inputs() if how == "calibrate" else None)
    wrapped = wrap(model)
    losses = train(wrapped, rank, world, data=partial(data, width=quantized.WIDTH, dtype=torch.float32))
    trained = {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for n, p in model.named_parameters()}
    return wrapped, losses, {n: p for n, p in trained.items() if n.endswith((".skew", ".shift"))}


def ddp_aware(how):
    """DistributedDataParallel around a fold-aware model, and its fold."""

    def job(rank, world):
        wrapped, losses, trained = aware(how, nn.parallel.DistributedDataParallel, rank, world)
        folded = oftfx.fold(wrapped)
        weights = {n: quantized.weight(folded.model, n) for n in quantized.NAMES}
        return {"losses": losses, "trained": trained, "weights": weights, "lines": [s.action for s in folded.report]}

    return job


def fsdp2_aware(how):
    """``fully_shard`` of each block; the quantized weights are whole in every process, as packages leave them."""

    def job(rank, world):
        from torch.distributed.fsdp import fully_shard

        def wrap(model):
            frozen = {p for p in model.parameters() if not p.requires_grad}
            for block in model.blocks:
                fully_shard(block, ignored_params=frozen)
            return fully_shard(model, ignored_params=frozen)

        _, losses, trained = aware(how, wrap, rank, world)
        return {"losses": losses, "trained": trained}

    return job


def fsdp1(rank, world):
    """FullyShardedDataParallel with original parameters."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    wrap = {"auto_wrap_policy": ModuleWrapPolicy({Block}), "device_id": torch.device("cpu")}
    model = FullyShardedDataParallel(transformed(True), use_orig_params=True, **wrap)
    losses = train(model, rank, world)
    with FullyShardedDataParallel.summon_full_params(model):
        parameters = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in model.named_parameters()}
        return outcome(model, losses, parameters)


def tensor_parallel(rank, world):
    """What is said of models of which every process has parts of layers, by whom and when they were cut."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    column, row = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())
    styles = {f"blocks.*.{n}": column for n in "qkv"} | {"blocks.*.o": row}
    cut = parallelize_module(base(), init_device_mesh("cpu", (world,)), styles)
    whole = oftfx.fold(transformed(True)).model
    folded = parallelize_module(whole, init_device_mesh("cpu", (world,)), styles)
    x, y = data(7)[0], data(7)[0]
    texts = {}
    for name, model, rules in (
        ("column", cut, {"blocks.0.k": oftfx.OFT(8)}),
        ("row", cut, {"blocks.*.o": oftfx.OFT(8)}),
        ("mixed", cut, {"*": oftfx.OFT(4)}),
        ("all-linear", cut, {"all-linear": oftfx.OFT(8)}),
        ("by class", cut, {nn.Linear: oftfx.OFT(4)}),
        ("fsdp2", fully_shard(base()), {"all-linear": oftfx.OFT(8)}),
    ):
        try:
            oftfx.transform(model, rules)
        except oftfx.errors.RuleError as error:
            texts[name] = str(error)
    rotated = randomize(oftfx.transform(cut, {"head": oftfx.OFT(8)}), std=0.3)
    rotated(x).square().sum().backward()
    return {"texts": texts, "folded": folded(y).detach(), "after": rotated(x).detach(),
            "grads": [p.grad for p in oftfx.adapter_parameters(rotated)]}  # fmt: skip


JOBS = {
    **{f"ddp-{s}": ddp(s) for s in (False, True)},
    "ddp-start-apart": ddp(False, start_apart=True),
    "ddp-static-graph": ddp(True, static_graph=True),
    "ddp-bucket-view": ddp(True, gradient_as_bucket_view=True, find_unused_parameters=True),
    "ddp-accumulates": ddp_accumulates,
    **{f"fsdp2-{u}-{s}": fsdp2(s, u) for u in ("root", "blocks", "layers") for s in (False, True)},
    "fsdp2-checkpointed": fsdp2_checkpointed,
    "fsdp2-evaluates": fsdp2_evaluates,
    "fsdp2-loads": fsdp2_loads,
    "fsdp2-narrow": fsdp2_narrow,
    "fsdp2-api": fsdp2_api,
    **{f"fsdp2-folds-{u}-{d}": fsdp2_folds(u, getattr(torch, d)) for u in ("blocks", "layers") for d in DTYPES},
    "fsdp2-folds-few-rows": fsdp2_folds_few_rows,
    "fsdp2-fold-is-undone": fsdp2_fold_is_undone,
    "fsdp2-fold-fails-together": fsdp2_fold_fails_together,
    "fsdp1": fsdp1,
    "tensor-parallel": tensor_parallel,
}
RESUMED = {"fsdp2-saves": fsdp2_saves, "fsdp2-resumes": fsdp2_resumes}
AWARE = {f"{kind}-{how}": job(how) for kind, job in (("ddp", ddp_aware), ("fsdp2", fsdp2_aware)) for how in WAYS}
EVERY = {**JOBS, **AWARE, **RESUMED}
