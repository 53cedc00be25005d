"""Groups of a weight against the definition: which group each element is in, by index arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oftfx.grids import Partition

KINDS = ("tiles", "act-order", "flat", "strided")


@st.composite
def cases(draw, kinds=KINDS):
    """A partition, and the set of elements ``(row, column)`` of each group in the order of groups."""
    kind = draw(st.sampled_from(kinds))
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 13))
    cells = [(r, c) for r in range(rows) for c in range(columns)]
    if kind == "flat":
        size = draw(st.integers(1, rows * columns + 3))
        return Partition.flat((rows, columns), size), [cells[i : i + size] for i in range(0, len(cells), size)]
    if kind == "strided":
        size = draw(st.sampled_from([n for n in range(1, len(cells) + 1) if len(cells) % n == 0]))
        count = len(cells) // size
        return Partition.strided((rows, columns), size), [cells[i::count] for i in range(count)]
    high, wide = draw(st.integers(1, rows + 2)), draw(st.integers(1, columns + 2))
    order = list(range(columns))
    if kind == "act-order":
        order = draw(st.permutations(order))
    partition = Partition.tiles((rows, columns), (high, wide), torch.tensor(order) if kind == "act-order" else None)
    groups = [
        [(r, c) for r in range(top, min(top + high, rows)) for c in order[left : left + wide]]
        for top in range(0, rows, high)
        for left in range(0, columns, wide)
    ]
    return partition, groups


def numbered(partition):
    return torch.arange(1, partition.rows * partition.columns + 1).reshape(partition.rows, partition.columns)


@settings(deadline=None, max_examples=300)
@given(case=cases())
def test_split_has_the_elements_of_each_group_and_zeros_where_some_are_missing(case):
    partition, groups = case
    weight = numbered(partition)
    rows = partition.split(weight)
    assert partition.groups == len(groups) == len(rows)
    for row, cells in zip(rows.tolist(), groups, strict=True):
        assert sorted(v for v in row if v) == sorted(int(weight[c]) for c in cells)
        assert row[0] == int(weight[cells[0]])
    assert torch.equal(partition.join(rows), weight)


@settings(deadline=None, max_examples=300)
@given(case=cases())
def test_expand_writes_each_group_and_pick_reads_it(case):
    partition, groups = case
    expected = torch.empty(partition.rows, partition.columns)
    values = torch.randn(len(groups))
    for value, cells in zip(values, groups, strict=True):
        for cell in cells:
            expected[cell] = value
    assert torch.equal(partition.expand(values), expected)
    assert torch.equal(partition.pick(expected), values)


@settings(deadline=None, max_examples=300)
@given(case=cases())
def test_no_group_crosses_column_sets_and_the_narrowed_partition_is_the_restriction(case):
    partition, groups = case
    sets = partition.column_sets(torch.device("cpu"))
    assert sorted(torch.cat(sets).tolist()) == list(range(partition.columns))
    home = {c: i for i, s in enumerate(sets) for c in s.tolist()}
    assert all(len({home[c] for _, c in cells}) == 1 for cells in groups)
    if len(sets) == 1:  # as a whole: groups that tie all columns together are never narrowed
        return
    number = {cell: i for i, cells in enumerate(groups) for cell in cells}
    for index, columns in enumerate(sets):
        part = partition.narrowed(len(columns))
        # In whatever order the columns of a set stand, elements are together that were so before.
        columns = columns[torch.randperm(len(columns))] if partition.kind == "tiles" else columns
        together = part.expand(torch.arange(part.groups)).long()
        old_to_new = {}
        for row in range(partition.rows):
            for place, column in enumerate(columns.tolist()):
                new = old_to_new.setdefault(number[row, column], int(together[row, place]))
                assert new == int(together[row, place])
        mine = [cells for cells in groups if home[cells[0][1]] == index]
        assert len(set(old_to_new.values())) == len(old_to_new) == len(mine) == part.groups


def test_sets_are_as_small_as_the_groups_allow():
    order = torch.randperm(10)
    sizes = {
        "tiles": ([4, 4, 2], Partition.tiles((3, 10), (1, 4))),
        "blocks": ([4, 4, 2], Partition.tiles((3, 10), (2, 4))),
        "act-order": ([4, 4, 2], Partition.tiles((3, 10), (1, 4), order)),
        "rows": ([10], Partition.tiles((3, 10), (1, 10))),
        "one for all": ([10], Partition.tiles((3, 10), (3, 10))),
        "runs of a row": ([5, 5], Partition.flat((3, 10), 5)),
        "runs across rows": ([10], Partition.flat((3, 10), 4)),
        "strided within columns": ([64, 64, 2], Partition.strided((6, 130), 3)),
        "strided across columns": ([10], Partition.strided((3, 10), 6)),
    }
    assert {k: [len(s) for s in p.column_sets(torch.device("cpu"))] for k, (_, p) in sizes.items()} == {
        k: w for k, (w, _) in sizes.items()
    }
    assert torch.equal(torch.cat(sizes["act-order"][1].column_sets(torch.device("cpu"))), order)


def test_runs_that_fit_rows_are_tiles():
    assert Partition.flat((3, 12), 4).kind == "tiles"
    assert Partition.flat((3, 12), 5).kind == "flat"
    assert Partition.flat((3, 12), 24).kind == "flat"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_depends_on_the_memory_layout(kind):
    shape = (6, 8)
    partition = {
        "tiles": Partition.tiles(shape, (4, 3)),
        "act-order": Partition.tiles(shape, (1, 3), torch.randperm(8)),
        "flat": Partition.flat(shape, 5),
        "strided": Partition.strided(shape, 4),
    }[kind]
    weight = torch.randn(8, 6).T
    assert not weight.is_contiguous()
    assert torch.equal(partition.split(weight), partition.split(weight.contiguous()))
    assert torch.equal(partition.join(partition.split(weight)), weight)
    assert torch.equal(partition.expand(partition.pick(partition.expand(torch.arange(partition.groups)))),
                       partition.expand(torch.arange(partition.groups)))  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(case=cases(), data=st.data())
def test_the_groups_of_some_columns(case, data):
    partition, groups = case
    number = {cell: i for i, cells in enumerate(groups) for cell in cells}
    columns = data.draw(st.permutations(range(partition.columns)))[: data.draw(st.integers(1, partition.columns))]
    expected = [[number[row, column] for column in columns] for row in range(partition.rows)]
    assert partition.groups_of(torch.tensor(columns)).tolist() == expected


@settings(deadline=None, max_examples=300)
@given(case=cases(), elements=st.integers(1, 60))
def test_bands_are_the_partition_in_parts(case, elements):
    partition, groups = case
    bands = partition.bands(elements)
    starts = [rows.start for rows, _, _ in bands]
    assert starts == [0, *(rows.stop for rows, _, _ in bands[:-1])]
    assert bands[-1][0].stop == partition.rows
    values, weight = torch.randn(partition.groups), torch.randn(partition.rows, partition.columns)
    assert torch.equal(torch.cat([p.expand(values[g]) for _, g, p in bands]), partition.expand(values))
    if partition.kind == "strided":
        assert len(bands) == 1
        return
    assert torch.equal(torch.cat([p.split(weight[r]) for r, _, p in bands]), partition.split(weight))
    # As many rows as were asked for, and never fewer than groups tie together.
    ends = {max(row for row, _ in cells) for cells in groups}
    free = [r for r in range(1, partition.rows) if not any(min(c)[0] < r <= max(c)[0] for c in groups)]
    assert ends >= {rows.stop - 1 for rows, _, _ in bands}
    if free and len(bands) > 1:
        assert bands[0][0].stop <= max(free[0], elements // partition.columns)


def test_a_band_of_runs_across_rows_ends_where_a_run_does():
    bands = Partition.flat((9, 6), 4).bands(1)
    assert [(r.start, r.stop, g.start, g.stop) for r, g, _ in bands] == [
        (0, 2, 0, 3), (2, 4, 3, 6), (4, 6, 6, 9), (6, 8, 9, 12), (8, 9, 12, 14),
    ]  # fmt: skip


def test_a_compiler_gets_one_band(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert len(Partition.tiles((64, 64), (1, 8)).bands(64)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_made_on_the_device_that_was_asked_for(kind):
    """Under another default device; ``meta`` takes part in no operation with a CPU's tensors."""
    shape, values = (6, 8), torch.arange(100.0)
    partition = {
        "tiles": Partition.tiles(shape, (4, 3)),
        "act-order": Partition.tiles(shape, (1, 3), torch.randperm(8)),
        "flat": Partition.flat(shape, 5),
        "strided": Partition.strided(shape, 4),
    }[kind]
    with torch.device("meta"):
        sets = partition.column_sets(torch.device("cpu"))
        assert {s.device.type for s in sets} == {"cpu"}
        assert {partition.groups_of(s).device.type for s in sets} == {"cpu"}
        assert partition.expand(values[: partition.groups]).device.type == "cpu"
    if kind != "act-order":
        assert {s.device.type for s in partition.column_sets(torch.device("meta"))} == {"meta"}
