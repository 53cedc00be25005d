import gc
import random
import weakref

import torch.nn as nn

from oftfx.trace.leaves import leaf_modules


def tree(rng, depth, shared):
    """Containers of containers, some modules in several places."""
    if depth == 0 or rng.random() < 0.2:
        made = rng.choice([nn.ReLU, nn.Dropout, lambda: nn.Linear(2, 2), lambda: nn.Embedding(3, 2)])()
        return rng.choice([made, *shared, made])
    made = nn.ModuleList([tree(rng, depth - 1, shared) for _ in range(rng.randint(0, 4))])
    shared.append(made)
    return made


def test_leaves_are_layers_and_what_holds_none():
    for seed in range(50):
        rng = random.Random(seed)
        root = nn.ModuleList([tree(rng, 4, []), tree(rng, 4, [])])
        every = list(root.modules())
        look_into = set(rng.sample(every, k=min(2, len(every)) if seed % 2 else 0))
        layers = {m for m in every if isinstance(m, (nn.Linear, nn.Embedding))}
        opaque = layers - look_into
        expected = {m for m in every if m in opaque or not set(m.modules()) & (opaque | look_into)}
        assert leaf_modules(root, layers, look_into) == expected - {root}


def test_every_module_is_visited_once(monkeypatch):
    root = inner = nn.Linear(2, 2)
    for _ in range(60):
        root = nn.Sequential(root, nn.ReLU())
    calls = []
    children = nn.Module.children
    monkeypatch.setattr(nn.Module, "children", lambda module: calls.append(module) or children(module))
    leaf_modules(root, {inner})
    assert len(calls) == len(list(root.modules()))


def test_nothing_holds_the_modules_afterwards():
    """Not even until Python looks for circles: a fold in place lets go of old weights layer by layer."""
    root = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    old = [weakref.ref(m) for m in root.modules()]
    gc.collect()
    gc.disable()
    try:
        leaf_modules(root, {root[0]})
        del root
        assert [r() for r in old] == [None] * 4
    finally:
        gc.enable()
