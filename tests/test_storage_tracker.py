"""What the tracker of storages counts, against sizes known beforehand."""

import gc
import threading

import torch

from tests.storage_tracker import StorageTracker

KIB = 256  # float32 elements of a KiB


def test_results_count_until_they_die():
    tracker = StorageTracker()
    with tracker.watching():
        a = torch.empty(4 * KIB)
        b = a + 1
        assert (tracker.live, tracker.peak) == (8 << 10, 8 << 10)
        del a
        assert (tracker.live, tracker.peak) == (4 << 10, 8 << 10)
        del b
    assert (tracker.live, tracker.peak) == (0, 8 << 10)


def test_intermediate_results_are_in_the_peak():
    tracker, x = StorageTracker(), torch.ones(4 * KIB)
    with tracker.watching():
        y = (x * 2 + 1) - 3  # two of them at a time
    assert (tracker.live, tracker.peak) == (4 << 10, 8 << 10)
    assert y[0] == 0


def test_views_and_writes_in_place_are_no_new_memory():
    tracker = StorageTracker()
    with tracker.watching():
        a = torch.zeros(KIB, 4)
        views = [a.T, a[:3], a.view(-1), a.detach(), a.expand(2, KIB, 4), torch.nn.Parameter(a)]
        a.add_(1).mul_(2)
        torch.add(a, 1, out=a)
        a[0] = 5
        assert tracker.live == tracker.peak == 4 << 10
        del a
        assert tracker.live == 4 << 10, "a view keeps the memory alive"
        views.clear()
    assert tracker.live == 0


def test_what_was_there_before_does_not_count():
    before, tracker = torch.zeros(KIB), StorageTracker()
    with tracker.watching():
        view = before[1:].mul_(2)
        del before
        assert view.sum() == 0
        assert tracker.live <= 8  # but for the sum and its comparison
        del view
    assert tracker.live == 0


def test_bytes_not_elements():
    tracker = StorageTracker()
    with tracker.watching():
        kept = [torch.empty(100, dtype=d) for d in (torch.float64, torch.bfloat16, torch.uint8)]
        kept.append(kept[0][::2].clone())
    assert tracker.live == 800 + 200 + 100 + 400


def test_several_results_of_one_operation():
    tracker, x = StorageTracker(), torch.randn(2, KIB)
    with tracker.watching():
        values, indices = x.sort(dim=1)
    assert tracker.live == x.nbytes * 3  # int64 indices
    del values
    assert tracker.live == indices.nbytes


def test_a_new_peak():
    tracker = StorageTracker()
    with tracker.watching():
        kept = torch.empty(KIB)
        torch.empty(8 * KIB)
        assert tracker.reset() == 1 << 10
        torch.empty(2 * KIB)
    assert tracker.peak == 3 << 10
    assert kept.nbytes == tracker.live


def test_several_threads():
    tracker, kept = StorageTracker(), []

    def work():
        with tracker.watching():
            kept.append(torch.empty(KIB))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.empty(KIB)
    assert tracker.live == 3 << 10
    kept.clear()
    gc.collect()
    assert tracker.live == 0
