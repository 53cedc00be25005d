"""Images in folders: which class each is of, what a model reads, and a run that learns them."""

from contextlib import nullcontext

import pytest
import torch

import oftfx
from oftfx.opened import open_model
from oftfx.training import images
from oftfx.training.images import read_images
from oftfx.training.read_examples import DataError
from tests.cli.command import run

pytestmark = pytest.mark.needs("transformers", "PIL", "tomli_w", "typer", "rich")


@pytest.fixture
def base(tmp_path):
    """A ViT that was never trained, with its processor."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8,
        id2label={0: "dark", 1: "light"}, label2id={"dark": 0, "light": 1},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    model.save_pretrained(tmp_path / "base")
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def folder(tmp_path):
    """Forty noisy images of two classes, of several shapes and modes, which are told apart by a gradient."""
    from PIL import Image

    generator = torch.Generator().manual_seed(1)
    for name, sign in (("dark", -1), ("light", 1)):
        place = tmp_path / "images" / name
        place.mkdir(parents=True)
        for i in range(20):
            high, wide = (31, 40) if i % 2 else (24, 24)
            slope = 0.5 + sign * torch.linspace(-0.4, 0.4, wide).expand(high, wide)
            noisy = (slope + 0.1 * torch.randn(high, wide, generator=generator)).clamp(0, 1)
            image = Image.fromarray((noisy * 255).to(torch.uint8).numpy())
            (image.convert("RGBA") if i % 3 == 0 else image).save(place / f"{i:02}.png")
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


class Processor:
    def __call__(self, images, return_tensors):
        return {"pixel_values": torch.zeros(len(images), 3, 4, 4)}


class Config:
    label2id = {"dark": 0, "light": 1}  # noqa: RUF012
    patch_size = 8


def test_classes_and_order(folder):
    data = read_images(folder, Processor(), Config)
    assert len(data) == 40
    assert data.said == "40 images of 2 classes"
    assert {f.parent.name: c for f, c in zip(data.files, data.classes, strict=True)} == {"dark": 0, "light": 1}
    first, last = data.split(10)
    assert (len(first), len(last)) == (30, 10)
    assert len(set(last.classes)) == 2  # mixed, so that what is held out is not one class
    assert [f.name for f in read_images(folder, Processor(), Config).files] == [f.name for f in data.files]
    batch = data.batch(3, 8)
    assert batch["labels"].shape == (8,)
    assert torch.equal(batch["labels"], data.batch(3, 8)["labels"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"dark": 0, "bright": 1}, "the folder 'light' is no class of the model, which has 2: dark, bright"),
        ({"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}, "is no class of the model, which has 3"),
    ],
)
def test_folders_that_are_no_class(folder, labels, message):
    with pytest.raises(DataError, match=message):
        read_images(folder, Processor(), type("C", (), {"label2id": labels}))


def test_counted_classes_are_said(folder):
    data = read_images(folder, Processor(), type("C", (), {"label2id": {"LABEL_0": 0, "LABEL_1": 1}}))
    assert data.remarks == ("the model only counts its classes; they are: dark 0, light 1",)


def test_what_is_no_image(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected a folder for each class"):
        read_images(tmp_path / "empty", Processor(), Config)
    (folder / "dark" / "00.png").write_bytes(b"nothing")
    data = read_images(folder, Processor(), Config)
    with pytest.raises(DataError, match=r"00\.png: cannot be read as an image"):
        data.together(range(40))


def test_images_are_looked_at_before_the_first_step(base, folder, tmp_path, monkeypatch):
    options = ["--base", base, "--data", folder, "--block-size", 8, "--steps", 2, "--held-out-rows", 4]
    whole = (folder / "light" / "03.png").read_bytes()
    (folder / "light" / "03.png").write_bytes(whole[:-30])  # a copy that was cut off: its header is sound
    done = run("train", tmp_path / "run", *options)
    assert done.status == 1
    assert done.lines[-1].startswith(f"error: {folder}/light/03.png: cannot be read as an image: ")
    (folder / "dark" / "00.png").write_text("nothing")
    (folder / "dark" / "01.png").write_text("nothing")
    data = read_images(folder, Processor(), Config)
    bars = []
    for many, opened in ((images._MANY, 0), (40, 1)):
        monkeypatch.setattr(images, "_MANY", many)
        with pytest.raises(DataError, match=r"\.png: cannot be read as an image: .*; and 2 more of 40$"):
            data.check(lambda *said: bars.append(said) or nullcontext(lambda *_: None))
        assert len(bars) == opened
    assert bars == [("look at the images", 40)]
    assert not (tmp_path / "run").exists()


def test_a_run_learns_them_and_goes_on(base, folder, tmp_path):
    options = ["--base", base, "--data", folder, "--target", "all-linear", "--block-size", 8, "--steps", 30]
    options += ["--rate", 0.02, "--batch", 8, "--held-out-rows", 8]
    done = run("train", tmp_path / "run", *map(str, options))
    assert done.status == 0, done.err
    assert "32 images of 2 classes, 8 held out" in done.err
    assert "accuracy 1.000" in done.out.splitlines()[-1]
    model = oftfx.load_adapter(open_model(base), tmp_path / "run" / "adapter")
    assert oftfx.adapter_parameters(model)
    (folder / "dark" / "99.png").write_bytes((folder / "dark" / "01.png").read_bytes())
    (tmp_path / "run" / "oftfx_training.json").unlink()
    again = run("train", tmp_path / "run")
    assert again.status == 1
    assert "is not what this run was begun with" in again.err
