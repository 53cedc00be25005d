"""A real convolution network, real words: what a fold promises, and the parts that measure it."""

import itertools
import json
import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx.demo import figures, ocr, ocr_job, words
from oftfx.errors import OftfxError
from tests.reference import dense_rotation, rel

pytestmark = pytest.mark.needs("easyocr_en_models", "gensim", "PIL")

STEPS = 12


@pytest.fixture(scope="module")
def test_words():
    return words.read("test")[:80]


@pytest.fixture(scope="module")
def scans(test_words):
    return words.render(test_words, words.SHIFTED)


@pytest.fixture(scope="module")
def base():
    return ocr.load()


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    model = oftfx.transform(base, ocr_job.RULES)
    losses = ocr_job.train(model, steps=STEPS, folder=tmp_path_factory.mktemp("run"), report=lambda *_: None)
    assert len(losses) == STEPS
    return model


@pytest.fixture(scope="module")
def folded(trained):
    return oftfx.fold(trained)


def test_the_network_reads_clean_words_and_not_the_scans(base, test_words, scans):
    clean, _ = ocr.measure(base, words.render(test_words), test_words)
    assert clean.cer <= 0.005
    shifted, _ = ocr.measure(base, scans, test_words)
    assert 0.1 <= shifted.cer <= 0.4


def test_the_metric_is_the_same_before_and_after_the_fold(base, trained, folded, test_words, scans):
    start, base_scores = ocr.measure(base, scans, test_words)
    unfolded, expected = ocr.measure(trained, scans, test_words)
    after, got = ocr.measure(folded.model, scans, test_words)
    assert abs(after.loss - unfolded.loss) <= 1e-4
    assert abs(after.cer - unfolded.cer) <= 1e-4
    assert after.accuracy == unfolded.accuracy
    # What is folded is far larger than what the fold changes, and it is worth having.
    assert rel(got, expected) <= 1e-5
    assert rel(expected, base_scores) >= 0.1
    assert unfolded.loss <= 0.5 * start.loss
    assert unfolded.cer <= 0.6 * start.cer


def test_every_convolution_is_rotated_and_folded(base, trained, folded):
    layers = {n: m for n, m in base.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert sum(isinstance(m, nn.Conv2d) for m in layers.values()) == 7
    assert {s.fqn for s in folded.report} == set(layers)
    assert all(s.action == "folded" for s in folded.report)
    skews = dict(trained.named_parameters())
    for name, layer in layers.items():
        weight = layer.weight.detach().double().flatten(1)
        skew = skews[f"{name}.oft.default.skew"].detach()
        block = weight.shape[1] // skew.shape[0]
        expected = weight @ dense_rotation(skew, block).T
        got = folded.model.get_submodule(name).weight
        assert rel(got.flatten(1), expected) <= 2e-6
        assert rel(got.flatten(1), weight) >= 1e-3


@pytest.mark.parametrize("index", [0, 3, 18])
def test_a_convolution_turns_the_patches_it_reads(base, trained, scans, index):
    """The definition, patch by patch in float64, against the transformed layer on its real input."""
    layer, turned = base.features[index], trained.features[index]
    with torch.no_grad():
        x = base.features[:index](scans[:2])
        got = turned(x)
    patches = nn.functional.unfold(x.double(), layer.kernel_size, padding=layer.padding).transpose(1, 2)
    skew = turned.oft.default.skew.detach()
    rotation = dense_rotation(skew, patches.shape[-1] // skew.shape[0])
    weight, bias = layer.weight.detach().double().flatten(1), layer.bias.detach().double()
    expected = (patches @ rotation @ weight.T + bias).transpose(1, 2)
    assert rel(got.flatten(2), expected) <= 2e-6
    assert rel(got, layer(x)) >= 1e-3


def test_the_folded_model_is_a_plain_one(base, trained, folded):
    assert [type(m) for m in folded.model.modules()] == [type(m) for m in base.modules()]
    assert set(folded.model.state_dict()) == set(base.state_dict())
    # Training left the base model's statistics alone.
    for name, buffer in base.named_buffers():
        assert torch.equal(buffer, ocr.load().get_buffer(name))
        assert torch.equal(folded.model.get_buffer(name), buffer)


class Stop(Exception):
    pass


def test_damaged_figures_are_named(tmp_path):
    (tmp_path / "results.json").write_text("[1")
    with pytest.raises(OftfxError, match=r"results\.json is not a JSON object: .*; remove it, or choose"):
        figures.read(tmp_path, {"steps": 1}, print)


def test_the_job_goes_on_after_an_interruption_and_writes_its_figures(tmp_path, monkeypatch):
    for name, small in {"TEST_WORDS": 64, "SCANS": 6, "CLEAN": 2}.items():
        monkeypatch.setattr(ocr_job, name, small)
    said, steps = [], []

    @contextmanager
    def bar(title, total):
        yield lambda done, remark: steps.append(done)

    @contextmanager
    def broken(title, total):
        def advance(done, remark):
            if done == 6:
                raise Stop

        yield advance

    with pytest.raises(Stop):
        ocr_job.run(tmp_path, steps=8, quick=True, say=said.append, bar=broken)
    with pytest.raises(OftfxError, match="holds a run with"):
        ocr_job.run(tmp_path, steps=9, quick=True, say=said.append)
    results = ocr_job.run(tmp_path, steps=8, quick=True, say=said.append, bar=bar)
    assert f"continuing the run in {tmp_path}" in said
    assert steps == [5, 6, 7, 8]  # the last checkpoint, then on
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert len(results["losses"]) == 8
    assert results["agreement"]["loss"] <= 1e-4
    assert results["agreement"]["cer"] <= 1e-4
    assert results["agreement"]["adapter"] >= 1000 * results["agreement"]["scores"]
    assert [r[0] for r in ocr_job.table_rows(results)] == ["base", "base + adapter", "folded"]


def test_words_of_training_and_test_are_different_and_fit_the_picture():
    train, test = words.read("train"), words.read("test")
    assert len(set(train)) == len(train) > 5000
    assert len(set(test)) == len(test) > 1000
    assert not set(train) & set(test)
    font = words._font()
    assert max(map(font.getlength, train + test)) <= words.WIDTH - 2 * words.MARGIN


def test_pictures_are_a_function_of_words_shift_and_seed():
    first, again = (words.render(["Drought", "ended"], words.SHIFTED, seed=3) for _ in range(2))
    assert first.shape == (2, 1, words.HEIGHT, words.WIDTH)
    assert torch.equal(first, again)
    assert not torch.equal(first, words.render(["Drought", "ended"], words.SHIFTED, seed=4))
    clean = words.render(["Drought"])
    assert clean.amax() == 1
    assert clean.amin() == -1
    assert clean[..., -words.MARGIN :].amin() == 1  # paper at the right


def test_a_slant_leans_to_the_right():
    def top_minus_bottom(picture):
        ink = (1 - picture[0, 0]).sum(1)
        columns = (1 - picture[0, 0]) @ torch.arange(float(words.WIDTH)) / ink.clamp(min=1e-6)
        rows = ink.nonzero().flatten()
        return float(columns[rows[0]] - columns[rows[-1]])

    upright, leaning = (words.render(["|"], words.Shift(slant=s)) for s in (0.0, 0.5))
    assert abs(top_minus_bottom(upright)) < 1
    assert top_minus_bottom(leaning) > 5


def test_decoding_joins_repetitions_and_drops_blanks():
    classes = {c: i + 1 for i, c in enumerate(ocr.CHARACTERS)}
    path = [0, classes["e"], classes["e"], 0, classes["e"], classes["l"], classes["l"], 0]
    scores = torch.nn.functional.one_hot(torch.tensor([path]), 97).float()
    assert ocr.decode(scores) == ["eel"]


def test_the_loss_is_that_of_all_paths_that_spell_the_word():
    scores = torch.randn(1, 4, 97, generator=torch.Generator().manual_seed(0))
    probability = scores.double().softmax(-1)[0]
    classes = [ocr.BLANK, *(ocr.CHARACTERS.index(c) + 1 for c in "ab")]
    total = 0.0
    for path in itertools.product(classes, repeat=4):
        one = torch.nn.functional.one_hot(torch.tensor([path]), 97).float()
        if ocr.decode(one) == ["ab"]:
            total += math.prod(float(probability[i, c]) for i, c in enumerate(path))
    assert float(ocr.losses(scores, ["ab"])) == pytest.approx(-math.log(total) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("read", "written", "count"), [("", "abc", 3), ("abc", "abc", 0), ("kitten", "sitting", 3), ("flaw", "lawn", 2)]
)
def test_edits(read, written, count):
    assert ocr.edits(read, written) == count


def test_foreign_weights_are_refused():
    with pytest.raises(OftfxError, match="not a weight of this recogniser"):
        ocr._name("module.Transformation.weight")
