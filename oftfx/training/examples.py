"""What is trained on, in an order that is a function of the step; rows of token ids with labels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Bar = Callable[[str, int], AbstractContextManager[Callable[[int, str], None]]]
"""Opens a progress bar: ``with bar(title, all) as advance: advance(done, remark)``."""
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


class Data(ABC):
    """Rows of any kind.

    Attributes:
        options: of the model's forward, besides a batch.
        remarks: what a user should know of how they were made.
    """

    options: ClassVar[Mapping[str, Any]] = {}
    remarks: tuple[str, ...]

    @abstractmethod
    def __len__(self) -> int:
        """How many rows."""

    @property
    @abstractmethod
    def said(self) -> str:
        """How much that is, in words."""

    @abstractmethod
    def split(self, held_out: int) -> tuple[Data, Data]:
        """Without the last rows, and these."""

    def check(self, bar: Bar) -> None:  # noqa: B027 texts have been read whole
        """Look at what is only read when its batch comes, before the first step; of most kinds there is nothing.

        Args:
            bar: see `Bar`.
        """

    @abstractmethod
    def together(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Rows side by side, as a model takes them."""

    @abstractmethod
    def learnt(self, batch: Mapping[str, Tensor]) -> int:
        """Over how many the model's loss of a batch is the mean."""

    @abstractmethod
    def tokens_in(self, batch: Mapping[str, Tensor]) -> int:
        """How many rows a layer of the model reads of a batch, about."""

    @abstractmethod
    def figures(self, loss: float, right: float) -> dict[str, float]:
        """What is said of held-out rows.

        Args:
            loss: mean.
            right: share whose most likely answer is the label; of texts it is not asked for.
        """

    def batch(self, call: int, size: int, seed: int = 0) -> dict[str, Tensor]:
        """Inputs of a model: the same for the same call, and no row twice in an epoch.

        Args:
            call: counted from 0, over all epochs.
            size: rows.
            seed: of the order, which is another one in each epoch.
        """
        size = min(size, len(self))
        epoch, index = divmod(call, len(self) // size)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed + epoch))
        return self.together([int(i) for i in order[index * size : (index + 1) * size]])

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """All rows in their order."""
        return (self.together(range(i, min(i + size, len(self)))) for i in range(0, len(self), size))


@dataclass(frozen=True)
class Examples(Data):
    """Rows of texts.

    Attributes:
        rows: of any lengths.
        pad: token id behind a short row in a batch; it is neither attended to nor learnt.
        remarks: what a user should know of how they were made.
    """

    options: ClassVar[Mapping[str, Any]] = {"use_cache": False}

    rows: Sequence[Row]
    pad: int = 0
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """How many are learnt."""
        return sum(int((r.labels[1:] != IGNORED).sum()) for r in self.rows)

    @property
    def said(self) -> str:
        """Rows and tokens."""
        return f"{len(self)} rows with {self.tokens:,} tokens to learn"

    def split(self, held_out: int) -> tuple[Examples, Examples]:
        """Without the last rows, and these."""
        cut = len(self.rows) - held_out
        return Examples(self.rows[:cut], self.pad, self.remarks), Examples(self.rows[cut:], self.pad)

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

    def learnt(self, batch: Mapping[str, Tensor]) -> int:
        """Tokens with a label."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def tokens_in(self, batch: Mapping[str, Tensor]) -> int:
        """Those that are no padding."""
        return int(batch["attention_mask"].sum())

    def figures(self, loss: float, right: float) -> dict[str, float]:  # noqa: ARG002
        """Loss and perplexity."""
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
