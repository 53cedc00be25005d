"""Images in a folder for each class, as what is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oftfx.errors import MissingExtraError
from oftfx.training.examples import Bar, Data
from oftfx.training.read_examples import DataError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_PATCH = 16
_MANY = 2000
"""From here on looking at all of them takes seconds."""


@dataclass(frozen=True)
class Images(Data):
    """Images with the class of each; they are opened when a batch is made.

    Attributes:
        files: of the images.
        classes: of each, as the model counts them.
        processor: transformers' image processor of the model.
        patch: edge of what a layer of the model reads as one row, in pixels.
        remarks: what a user should know of how they were made.
    """

    files: Sequence[Path]
    classes: Sequence[int]
    processor: Any
    patch: int = _PATCH
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    @property
    def said(self) -> str:
        """Images and classes."""
        return f"{len(self)} images of {len(set(self.classes))} classes"

    def split(self, held_out: int) -> tuple[Images, Images]:
        """Without the last ones, and these."""
        cut = len(self) - held_out
        first, last = ((self.files[s], self.classes[s]) for s in (slice(0, cut), slice(cut, None)))
        return Images(*first, self.processor, self.patch, self.remarks), Images(*last, self.processor, self.patch)

    def check(self, bar: Bar) -> None:
        """Open every image, and read as much of it as its kind needs to know itself: its pixels come with its batch.

        Raises:
            DataError: one cannot be read; the first is named, and how many there are.
        """
        if len(self) < _MANY:
            bar = _no_bar
        bad = list[DataError]()
        with bar("look at the images", len(self)) as advance:
            for done, file in enumerate(self.files, 1):
                try:
                    _verify(file)
                except DataError as error:
                    bad.append(error)
                advance(done, "")
        if len(bad) > 1:
            raise DataError(f"{bad[0]}; and {len(bad) - 1} more of {len(self)}")
        if bad:
            raise bad[0]

    def together(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """``pixel_values (n, channels, high, wide)`` and ``labels (n,)``."""
        opened = [_opened(self.files[i]) for i in chosen]
        pixels = self.processor(opened, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([self.classes[i] for i in chosen])}

    def learnt(self, batch: Mapping[str, Tensor]) -> int:
        """Every image."""
        return len(batch["labels"])

    def tokens_in(self, batch: Mapping[str, Tensor]) -> int:
        """Patches."""
        count, _, high, wide = batch["pixel_values"].shape
        return count * max(1, high // self.patch) * max(1, wide // self.patch)

    def figures(self, loss: float, right: float) -> dict[str, float]:
        """Loss and accuracy."""
        return {"loss": loss, "accuracy": right}


def read_images(folder: Path, processor: Any, config: Any) -> Images:
    """The images of a folder, in an order that mixes the classes and is always the same.

    A folder's name is a label of the model, as its configuration has it in ``label2id``. Where its labels are only
    counted (``LABEL_0``), the folders are taken in the order of their names, and the remarks say so.

    Args:
        folder: with a folder for each class.
        processor: transformers' image processor of the model.
        config: of the model.

    Raises:
        DataError: there is no image, or a folder is no class of the model.
    """
    folders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = [(p, sorted(f for f in p.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())) for p in folders]
    found = [(p, files) for p, files in found if files]
    if not found:
        raise DataError(
            f"{folder}: expected a folder for each class with images in it ({', '.join(SUFFIXES)}); there is none"
        )
    classes, remark = _classes(folder, [p.name for p, _ in found], config)
    pairs = [(file, classes[p.name]) for p, files in found for file in files]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    patch = getattr(config, "patch_size", None)
    return Images(
        [pairs[i][0] for i in order],
        [pairs[i][1] for i in order],
        processor,
        patch if isinstance(patch, int) and patch > 0 else _PATCH,
        (remark,) if remark else (),
    )


def _classes(folder: Path, names: list[str], config: Any) -> tuple[dict[str, int], str]:
    known = {str(k): int(v) for k, v in (getattr(config, "label2id", None) or {}).items()}
    if all(n in known for n in names):
        return {n: known[n] for n in names}, ""
    counted = all(k == f"LABEL_{v}" for k, v in known.items())
    if counted and len(names) == len(known):
        said = ", ".join(f"{n} {i}" for i, n in enumerate(names))
        return {n: i for i, n in enumerate(names)}, f"the model only counts its classes; they are: {said}"
    unknown = next(n for n in names if n not in known)
    raise DataError(
        f"{folder}: the folder {unknown!r} is no class of the model, which has {len(known)}: "
        f"{', '.join(list(known)[:8])}{', ...' if len(known) > 8 else ''}. Name folders as its config's label2id does"
    )


def _opened(file: Path) -> Any:
    with _image(file) as image:
        return image.convert("RGB")


def _verify(file: Path) -> None:
    with _image(file) as image:
        image.verify()


@contextmanager
def _image(file: Path) -> Iterator[Any]:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "demo", "Reading images") from error
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # UnidentifiedImageError: OSError
        raise DataError(f"{file}: cannot be read as an image: {error}") from error


def _no_bar(_title: str, _total: int) -> AbstractContextManager[Callable[[int, str], None]]:
    return nullcontext(lambda _done, _remark: None)
