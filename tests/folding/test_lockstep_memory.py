"""What a calibrated fold of a whole language model keeps: nothing that grows with the number of its layers."""

import gc

import pytest
import torch

import oftfx
from oftfx import OFT
from oftfx.folding import lockstep
from oftfx.folding.lockstep import Lockstep
from tests.quantized import quantize
from tests.reference import randomize
from tests.storage_tracker import StorageTracker

WIDTH, INNER, LENGTH = 128, 256, 96

pytestmark = pytest.mark.needs("transformers")


@pytest.fixture
def llama(tiny_llama):
    def make(layers):
        return tiny_llama(hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers)

    return make


@pytest.fixture
def tracker(monkeypatch):
    """Watches the threads of the forwards as well."""
    tracker, plain = StorageTracker(), lockstep.call_once

    def watched(model, inputs):
        with tracker.watching():
            return plain(model, inputs)

    monkeypatch.setattr(lockstep, "call_once", watched)
    return tracker


def batches(ids, count):
    return [ids(2, LENGTH, seed=i) for i in range(count)]


WAITING = {"self_attn.q_proj": 3.5, "mlp.down_proj": 6.5}
"""Hidden states that a block's forward has at hand there: the embeddings, the residual stream, its norm, and the inner
states, which are twice as wide; with a mask and positions."""
HIDDEN = 2 * LENGTH * WIDTH * 4  # bytes of the hidden states of one batch


@pytest.mark.parametrize("place", ["self_attn.q_proj", "mlp.down_proj"])
def test_what_waits_at_a_layer_is_hidden_states(llama, ids, tracker, place):
    alive = {}
    for depth in (2, 5):
        for count in (1, 4):
            model = llama(depth)
            layers = [b.get_submodule(place) for b in model.model.layers]
            tracker.reset()
            assert tracker.live == 0
            found = alive[depth, count] = []
            Lockstep(model, layers).run(batches(ids, count), lambda *_, found=found: found.append(tracker.live))
    for (depth, count), found in alive.items():
        assert len(found) == depth
        later = found[1:]  # in the first block the residual stream still is the embeddings
        # Keys and values would add a HIDDEN a batch and block.
        assert max(later) - min(later) < 0.05 * HIDDEN * count
        assert max(found) == pytest.approx(count * alive[2, 1][1], rel=0.05)
    assert alive[2, 1][1] < WAITING[place] * HIDDEN


def fold_peak(model, data, tracker):
    gc.collect()
    start = tracker.reset()
    with tracker.watching():
        oftfx.fold(model, quantized="calibrate", calibration=data, inplace=True)
    return tracker.peak - start, tracker.live - start


def rotated(llama, depth):
    """Every Linear of the blocks in NF4, with a rotation."""
    model = llama(depth)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, torch.nn.Linear):
                    setattr(part, name, quantize(layer))
    return randomize(oftfx.transform(model, {"model.layers.*_proj": OFT(16)}), std=0.05)


@pytest.mark.needs("bitsandbytes")
def test_the_peak_of_a_calibrated_fold_does_not_grow_with_the_layers(llama, ids, tracker, monkeypatch):
    monkeypatch.setattr("oftfx.folds._MEASURED", 0)  # outputs to compare are kept as long as the fold takes
    peaks = {}
    fold_peak(rotated(llama, 2), batches(ids, 1), tracker)  # tables that a first rounding keeps for good, 0.3 MB
    for depth in (2, 6):
        for count in (2, 6):
            model = rotated(llama, depth)
            model(**batches(ids, 1)[0])  # what a first forward keeps for good
            peak, left = fold_peak(model, batches(ids, count), tracker)
            stored = sum(t.numel() * t.element_size() for t in model.model.layers.state_dict().values())
            assert left <= 1.1 * stored
            peaks[depth, count] = peak - left
    waiting, largest, moments = WAITING["mlp.down_proj"] * HIDDEN, 4 * INNER * WIDTH, 4 * INNER**2
    for (_, count), peak in peaks.items():
        # Two models wait; the last summand is of the forward that runs.
        assert peak < 2 * count * waiting + 5 * moments + 8 * largest + 4 * HIDDEN
    for count in (2, 6):
        assert peaks[6, count] < 1.02 * peaks[2, count]
