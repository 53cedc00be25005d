"""What recordings and exports use of torch that has no public name."""

import threading

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from oftfx.trace.torch_private import through_checkpoints


def test_checkpoints_are_called_directly_in_this_thread_alone():
    layer, x = nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    kinds = {}

    def run(where):
        y = checkpoint(layer, x, use_reentrant=True)
        kinds[where] = type(y.grad_fn).__name__

    with through_checkpoints(), through_checkpoints():
        run("here")
        other = threading.Thread(target=run, args=("beside",))
        other.start()
        other.join()
    run("after")
    assert kinds == {
        "here": "AddmmBackward0",
        "beside": "CheckpointFunctionBackward",
        "after": "CheckpointFunctionBackward",
    }
    assert "apply" not in vars(torch.utils.checkpoint.CheckpointFunction)


def test_another_ones_way_of_checkpointing_is_there_again_afterwards(monkeypatch):
    called = []

    def mine(run, preserve, *args):
        called.append(run)
        return run(*args)

    monkeypatch.setattr(torch.utils.checkpoint.CheckpointFunction, "apply", staticmethod(mine))
    layer, x = nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    with through_checkpoints():
        checkpoint(layer, x, use_reentrant=True)
    assert called == []
    checkpoint(layer, x, use_reentrant=True)
    assert called == [layer]
