"""Real words of the Lee news corpus as pictures in PIL's own font: clean, or as a bad scan would show them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from oftfx.demo import text
from oftfx.errors import MissingExtraError

HEIGHT, WIDTH, FONT_SIZE = 64, 224, 32
MARGIN = 10
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9'-]*")


@dataclass(frozen=True)
class Shift:
    """What a scan does to a word; nothing by default.

    Args:
        slant: columns that the letters lean to the right, in each row of height.
        blur: standard deviation of a Gaussian, in pixels.
        contrast: difference between paper and ink, 1 is white and black.
        noise: standard deviation of what is added to each pixel, of 1.
    """

    slant: float = 0.0
    blur: float = 0.0
    contrast: float = 1.0
    noise: float = 0.0


CLEAN = Shift()
SHIFTED = Shift(slant=0.35, blur=2.0, contrast=0.5, noise=0.06)


def read(split: Literal["train", "test"], shortest: int = 3, longest: int = 10) -> list[str]:
    """Every different word of a split, in a fixed random order; no word is in both splits.

    Args:
        split: ``"test"`` has the words of ``lee.cor``, ``"train"`` those that are only in ``lee_background.cor``.
        shortest: characters a word has at least.
        longest: characters a word has at most.
    """
    words = _words(split)
    if split == "train":
        words -= _words("test")
    chosen = sorted(w for w in words if shortest <= len(w) <= longest)
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))
    return [chosen[i] for i in order.tolist()]


def _words(split: Literal["train", "test"]) -> set[str]:
    return set(WORD.findall(" ".join(text.read(split))))


def render(words: list[str], shift: Shift = CLEAN, seed: int = 0) -> Tensor:
    """Pictures of words, ``(n, 1, 64, 224)`` float32, paper near 1 and ink near -1.

    The same words, shift and seed give the same pictures.

    Raises:
        MissingExtraError: pillow is missing.
    """
    font = _font()
    pictures = torch.stack([_picture(word, font, shift) for word in words])
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(seed))
    grey = 0.5 + shift.contrast * (pictures - 0.5) + shift.noise * noise
    return (grey.clamp(0.0, 1.0) - 0.5) / 0.5


def _font() -> Any:
    try:
        from PIL import ImageFont
    except ImportError as error:
        raise MissingExtraError("pillow", "demo", "Drawing words") from error
    return ImageFont.load_default(FONT_SIZE)


def _picture(word: str, font: Any, shift: Shift) -> Tensor:
    """One word, ``(1, 64, 224)``, from 0 (ink) to 1 (paper)."""
    from PIL import Image, ImageDraw, ImageFilter

    page = Image.new("L", (WIDTH, HEIGHT), 255)
    middle = HEIGHT // 2
    ImageDraw.Draw(page).text((MARGIN, middle), word, fill=0, font=font, anchor="lm")
    if shift.slant:
        # PIL asks where each pixel comes from: x + slant * (y - middle).
        lean = (1.0, shift.slant, -shift.slant * middle, 0.0, 1.0, 0.0)
        page = page.transform(page.size, Image.Transform.AFFINE, lean, Image.Resampling.BICUBIC, fillcolor=255)
    if shift.blur:
        page = page.filter(ImageFilter.GaussianBlur(shift.blur))
    pixels = torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8)
    return pixels.view(1, HEIGHT, WIDTH).float() / 255
