"""What is trained on: rows of token ids with labels, in an order that is a function of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that is not learnt, as transformers has it."""


@dataclass(frozen=True)
class Row:
    """One sequence.

    Attributes:
        ids: token ids ``(length,)``, int64.
        labels: what is learnt at each of them, ``(length,)``; `IGNORED` where nothing is.
    """

    ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Examples:
    """Rows to train on.

    Attributes:
        rows: of any lengths.
        pad: token id behind a short row in a batch; it is neither attended to nor learnt.
        remarks: what a user should know of how they were made.
    """

    rows: Sequence[Row]
    pad: int = 0
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """How many are learnt."""
        return sum(int((r.labels[1:] != IGNORED).sum()) for r in self.rows)

    def split(self, held_out: int) -> tuple[Examples, Examples]:
        """Without the last rows, and these."""
        cut = len(self.rows) - held_out
        return Examples(self.rows[:cut], self.pad, self.remarks), Examples(self.rows[cut:], self.pad)

    def batch(self, call: int, size: int, seed: int = 0) -> dict[str, Tensor]:
        """Inputs of a model: the same for the same call, and no row twice in an epoch.

        Args:
            call: counted from 0, over all epochs.
            size: rows.
            seed: of the order, which is another one in each epoch.
        """
        size = min(size, len(self.rows))
        epoch, index = divmod(call, len(self.rows) // size)
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed + epoch))
        return self.together([int(i) for i in order[index * size : (index + 1) * size]])

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """All rows in their order."""
        return [self.together(range(i, min(i + size, len(self.rows)))) for i in range(0, len(self.rows), size)]

    def together(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Rows side by side, padded on the right."""
        rows = [self.rows[i] for i in chosen]
        length = max(len(r.ids) for r in rows)
        ids = torch.full((len(rows), length), self.pad)
        labels = torch.full((len(rows), length), IGNORED)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)], labels[i, : len(row.ids)], mask[i, : len(row.ids)] = row.ids, row.labels, 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
