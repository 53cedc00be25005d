"""What PEFT's tests ask of every tuner, as checks of one side: each returns whether it holds.

None where it asks nothing of a row (text of a convolution network). The same as there: the identity at the start,
effects, what trains, folding, silencing, files, several adapters, dtypes, copies. A check whose answer needs the other
side compares with it.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from tests.reference import rel
from tools.compare.peft_adapted import OTHER, Adapted, output
from tools.compare.peft_tables import MODELS, Row, build, inputs

Check = Callable[[type[Adapted], Row], bool | None]
CHECKS: dict[str, Check] = {}
CLOSE = 1e-5


def check(function: Check) -> Check:
    """Register a check under the words of its name."""
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


def base_output(row: Row) -> torch.Tensor:
    return output(build(row.model), inputs(row.model))


def is_text(row: Row) -> bool:
    return row.model not in tuple(MODELS)[:3]


@check
def the_start_is_the_base(side, row):
    return rel(side(row).output(), base_output(row)) <= 1e-6


@check
def random_weights_have_an_effect(side, row):
    return rel(side(row, init_weights=False).output(), base_output(row)) > (1e-6 if row.config.get("coft") else 1e-4)


@check
def the_output_is_the_other_sides(side, row):
    return rel(side(row).fill().output(), OTHER[side](row).fill().output()) <= CLOSE


@check
def as_much_trains_as_on_the_other_side(side, row):
    counts = [sorted(tuple(p.shape) for p in kind(row).trainable().values()) for kind in (side, OTHER[side])]
    return counts[0] == counts[1]


@check
def a_step_changes_what_trains_and_nothing_else(side, row):
    made = side(row, init_weights=False)
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    made.model.train()
    optimizer = torch.optim.SGD(made.trainable().values(), lr=0.5)
    for _ in range(3):
        out = made.model(**made.given)
        (out if isinstance(out, torch.Tensor) else out[0]).square().mean().backward()
        optimizer.step()
    changed = {n for n, p in made.model.named_parameters() if not torch.equal(p, before[n])}
    trains = made.trainable()
    return bool(changed) and changed <= set(trains) and all(p.grad is not None for p in trains.values())


@check
def folded_is_unfolded(side, row):
    made = side(row).fill()
    return rel(output(made.folded(), made.given), made.output()) <= CLOSE


@check
def fold_and_back_is_where_it_was(side, row):
    made = side(row).fill()
    before = made.output()
    made.fold_and_back()
    return rel(made.output(), before) <= CLOSE


@check
def silenced_it_is_the_base(side, row):
    made = side(row).fill()
    before = made.output()
    with made.disabled():
        silent = made.output()
    return torch.equal(silent, base_output(row)) and torch.equal(made.output(), before)


@check
def saved_and_loaded_it_is_the_same(side, row):
    made = side(row).fill()
    with tempfile.TemporaryDirectory() as folder:
        return rel(output(made.load(made.save(Path(folder))), made.given), made.output()) <= 1e-6


@check
def the_other_side_reads_its_file(side, row):
    made, other = side(row).fill(), OTHER[side](row)
    with tempfile.TemporaryDirectory() as folder:
        return rel(output(other.load(made.save(Path(folder))), made.given), made.output()) <= CLOSE


@check
def a_name_makes_no_difference(side, row):
    made = side(row, adapter="another").fill("another")
    with tempfile.TemporaryDirectory() as folder:
        again = made.load(made.save(Path(folder), "another"))
    errors = rel(made.output(), side(row).fill().output()), rel(output(again, made.given), made.output())
    return max(errors) <= 1e-6


@check
def loaded_it_trains_only_if_asked(side, row):
    made = side(row).fill()
    with tempfile.TemporaryDirectory() as folder:
        path = made.save(Path(folder))
        frozen, trainable = made.load(path), made.load(path, trainable=True)
    shapes = sorted(tuple(p.shape) for p in trainable.parameters() if p.requires_grad)
    asked = sorted(tuple(p.shape) for p in made.trainable().values())
    return shapes == asked and not any(p.requires_grad for p in frozen.parameters())


@check
def a_configuration_for_inference_trains_nothing(side, row):
    return not side(row, inference_mode=True).trainable()


@check
def switching_switches(side, row):
    alone = [side(row).fill(seed=seed).output() for seed in (0, 1)]
    made = side(row).fill()
    made.add("other")
    made.fill("other", seed=1)
    found = []
    for name in ("default", "other", "default", "other"):
        made.set(name)
        found.append(made.output())
    differ = rel(alone[0], alone[1]) > 1e-6 or row.config.get("coft")  # two of the same bound may be equal
    return differ and all(rel(f, alone[i % 2]) <= 1e-6 for i, f in enumerate(found))


@check
def only_what_acts_trains(side, row):
    made = side(row)
    first = set(made.trainable())
    made.add("other")
    unchanged = set(made.trainable()) == first
    made.set("other")
    second = set(made.trainable())
    made.set("default")
    return unchanged and len(first) == len(second) and set(made.trainable()) == first


@check
def the_inactive_is_removed(side, row):
    made = side(row).fill()
    before = made.output()
    made.add("other")
    made.remove("other")
    return torch.equal(made.output(), before) and made.active() == ["default"]


@check
def the_active_is_removed_and_another_acts(side, row):
    made = side(row)
    made.add("other")
    made.fill("other", seed=1)
    made.set("other")
    expected = made.output()
    made.set("default")
    made.remove("default")
    return made.active() == ["other"] and rel(made.output(), expected) <= 1e-6


@check
def unknown_and_taken_names_are_refused(side, row):
    made = side(row)
    before = set(dict(made.model.named_parameters()))
    for call in (lambda: made.remove("other"), lambda: made.add("default")):
        try:
            call()
        except ValueError:
            continue
        return False
    return set(dict(made.model.named_parameters())) == before and made.active() == ["default"]


@check
def rows_of_a_batch_have_adapters_of_their_own(side, row):
    made = side(row).fill()
    made.add("other")
    made.fill("other", seed=1)
    count = len(next(iter(made.given.values())))
    names = [("default", None, "other")[i % 3] for i in range(count)]
    expected = base_output(row).clone()
    for name in ("default", "other"):
        made.set(name)
        at = [i for i, n in enumerate(names) if n == name]
        expected[at] = made.output()[at]
    made.set("default")
    return rel(made.rows(names), expected) <= CLOSE


@check
def two_at_once_fold_as_they_act(side, row):
    made = side(row).fill()
    made.add("other")
    made.fill("other", seed=1)
    if row.config.get("modules_to_save") or (row.config.get("task_type") == "SEQ_CLS"):
        try:
            made.set("default", "other")
        except ValueError:
            return True
        return False
    made.set("default", "other")
    return rel(output(made.folded(), made.given), made.output()) <= CLOSE


@check
def adapters_are_float32_in_half_models(side, row):
    for dtype in (torch.float16, torch.bfloat16):
        made = side(row, base=build(row.model).to(dtype))
        if not torch.isfinite(made.output()).all() or any(p.dtype != torch.float32 for p in made.own("default")[:1]):
            return False
    return True


@check
def copies_are_the_same(side, row):
    made = side(row).fill()
    copies = copy.deepcopy(made.model), pickle.loads(pickle.dumps(made.model))
    return all(torch.equal(output(c, made.given), made.output()) for c in copies)


@check
def text_is_generated(side, row):
    if not is_text(row) or not build(row.model).can_generate():
        return None
    made = side(row).fill()
    given = {k: v for k, v in made.given.items() if k == "input_ids"}
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    return torch.equal(made.model.generate(**given, **settings), made.folded().generate(**given, **settings))


@check
def checkpointed_gradients_are_the_same(side, row):
    if not is_text(row) or not build(row.model).supports_gradient_checkpointing:
        return None
    found = []
    for checkpointed in (False, True):
        made = side(row).fill()
        for module in made.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointed:
            made.model.gradient_checkpointing_enable({"use_reentrant": False})
        made.model.train()
        torch.manual_seed(0)
        out = made.model(**made.given)[0]
        out.square().mean().backward()
        found.append([p.grad for p in made.trainable().values()])
    return all((a is None) == (b is None) and (a is None or rel(a, b) <= CLOSE) for a, b in zip(*found, strict=True))
