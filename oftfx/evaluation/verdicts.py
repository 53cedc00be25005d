"""Whether something says what a model in torch says: prompt by prompt, and in one sentence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from oftfx.evaluation.tokens import Followed
from oftfx.terminal import render

State = Literal["equal", "near ties", "different", "base", "untold"]
COLUMNS = ("prompt", "tokens the same", "first other", "expected", "margin", "logit error", "adapter's effect")
LARGE = 0.5
"""Of what the adapter does to the logits, as in a fold's report."""


@dataclass(frozen=True)
class Verification:
    """What was compared.

    Attributes:
        subject: what was asked.
        against: what it should say.
        rows: a prompt each.
        texts: the prompts, and the expected and the found token where they differ, as text.
        tie: margins below this are ties, which rounding decides.
    """

    subject: str
    against: str
    rows: tuple[Followed, ...]
    texts: tuple[tuple[str, str, str], ...]
    tie: float

    @property
    def state(self) -> State:
        """What came out.

        ``equal``; ``near ties``: only tokens differ that rounding may decide; ``base``: it speaks as if the adapter
        were not there; ``untold``: so does the expected model, and nothing but tokens was given; ``different``: other
        tokens, or logits that are off by more than half of what the adapter does to them.
        """
        wrong = [r for r in self.rows if not r.is_equal]
        if self._adapter_missing:
            return "base"
        if self._far:
            return "different"
        if not wrong:
            untold = all(r.like_base and r.error is None for r in self.rows)
            return "untold" if untold else "equal"
        return "near ties" if all(r.margin is not None and r.margin < self.tie for r in wrong) else "different"

    @property
    def _far(self) -> bool:
        """By the logits, which see more than the likeliest token."""
        pairs = [(r.error, r.effect) for r in self.rows if r.error is not None and r.effect]
        return any(error > LARGE * effect for error, effect in pairs if effect is not None)

    @property
    def _adapter_missing(self) -> bool:
        told = [r for r in self.rows if r.effect]
        if not told:
            return False
        if all(r.error is not None for r in told):
            # The distance from the expected logits is then the whole effect.
            return all(abs((r.error or 0.0) - (r.effect or 0.0)) <= 0.02 * (r.effect or 0.0) for r in told)
        return all(r.like_base for r in told) and any(not r.is_equal for r in told)

    @property
    def sentence(self) -> str:
        """The verdict."""
        count = sum(len(r.expected.tokens) for r in self.rows)
        if self.state == "equal":
            return f"equal: {self.subject} gives the {count} tokens of {self.against}, to {len(self.rows)} prompts"
        if self.state == "untold":
            return (
                f"not told: {self.subject} gives the tokens of {self.against}, but so does the base without the "
                "adapter; use prompts to which the adapter answers otherwise (--prompt), or more --tokens"
            )
        if self.state == "base":
            return f"the adapter is not there: {self.subject} speaks like the base model"
        wrong = [i for i, r in enumerate(self.rows) if not r.is_equal]
        if self.state == "near ties":
            margin = max(self.rows[i].margin or 0.0 for i in wrong)
            return (
                f"equal up to near ties: {len(wrong)} of {len(self.rows)} prompts go another way where the two best "
                f"logits of {self.against} are {margin:.1e} apart at most"
            )
        if not wrong:
            worst = max((r for r in self.rows if r.effect), key=lambda r: (r.error or 0.0) / (r.effect or 1.0))
            return (
                f"different: the tokens of {self.subject} are those of {self.against}, but its logits are off by "
                f"{worst.error:.1e}, where the whole adapter changes them by {worst.effect:.1e}"
            )
        first = self.rows[wrong[0]]
        prompt, expected, found = self.texts[wrong[0]]
        return (
            f"different: to {prompt!r}, token {first.same + 1} is {found!r}, where {self.against} says {expected!r}"
            + ("" if first.margin is None else f" by a margin of {first.margin:.2e}")
        )

    @property
    def is_equal(self) -> bool:
        """Up to near ties."""
        return self.state in ("equal", "near ties")

    def table(self) -> str:
        """A row a prompt, and the verdict (needs the ``report`` extra)."""
        return render(f"{self.subject} against {self.against}", COLUMNS, self._cells()) + self.sentence + "\n"

    def _cells(self) -> list[Sequence[str]]:
        cells = []
        for row, (prompt, expected, found) in zip(self.rows, self.texts, strict=True):
            margin = "" if row.margin is None else f"{row.margin:.1e}"
            error = "" if row.error is None else f"{row.error:.1e}"
            effect = "" if row.effect is None else f"{row.effect:.1e}"
            same = f"{row.same}/{len(row.expected.tokens)}"
            words = repr(found) if found else "", repr(expected) if expected else ""
            cells.append((_short(prompt), same, *words, margin, error, effect))
        return cells  # type: ignore[return-value]

    def to_json(self) -> str:
        """All figures as JSON text."""
        rows = [
            {
                "prompt": prompt,
                "same": r.same,
                "of": len(r.expected.tokens),
                "expected": expected or None,
                "found": found or None,
                "margin": r.margin,
                "logit_error": r.error,
                "adapter_effect": r.effect,
            }
            for r, (prompt, expected, found) in zip(self.rows, self.texts, strict=True)
        ]
        head = {"subject": self.subject, "against": self.against, "state": self.state, "verdict": self.sentence}
        return json.dumps({**head, "tie": self.tie, "prompts": rows}, indent=1)


def _short(text: str, length: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
