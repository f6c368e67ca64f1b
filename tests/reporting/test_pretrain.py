"""The tiny CLIP that is shipped, and the script that made it."""

import hashlib

import pretrain_tiny as pretrain
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import clip
from clip.loading import BUNDLED_MODELS, WEIGHTS_DIR
from datasets import digits

NAME = "ViT-Tiny/8"


@pytest.fixture(scope="module")
def signs():
    return pretrain.draw_signs()


@pytest.fixture(scope="module")
def validation():
    return pretrain.validation_set()


@pytest.fixture
def source(signs, monkeypatch):
    monkeypatch.setattr(pretrain, "draw_signs", lambda: signs)
    return pretrain.Source(clip.CLIP(**pretrain.SIZES))


def test_the_shipped_file_is_the_one_the_code_loads_in_half_precision_and_openais_layout():
    path = WEIGHTS_DIR / BUNDLED_MODELS[NAME][0]
    data = path.read_bytes()
    assert hashlib.sha256(data).hexdigest() == BUNDLED_MODELS[NAME][1] and len(data) < 2.5e6
    assert BUNDLED_MODELS[NAME][1] in (path.parent / "README.md").read_text(encoding="utf-8")
    state = torch.load(path, weights_only=True)
    extra = {key: state.pop(key).item() for key in clip.model.EXTRA_KEYS}
    assert extra == {"input_resolution": 32, "context_length": 32, "vocab_size": 514}
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert state.keys() == clip.CLIP(**pretrain.SIZES).state_dict().keys()
    assert all(value.isfinite().all() for value in state.values())


def test_the_shipped_model_has_the_stated_sizes_and_room_for_every_prompt():
    model, _ = clip.load(NAME, "cpu")
    assert model.visual.input_resolution == 32
    assert tuple(model.visual.conv1.weight.shape) == (128, 3, 8, 8)
    depths = len(model.visual.transformer.resblocks), len(model.transformer.resblocks)
    assert depths == (4, 2) and model.visual.transformer.resblocks[0].attn.heads == 2
    assert model.text_projection.shape == (64, 64)
    assert (model.context_length, model.vocab_size) == (32, 514)
    tokens = model.tokenize([f"a photo of a {name}." for name in digits.CLASSNAMES])
    assert tokens.shape == (10, 32)
    assert (tokens.argmax(dim=1) + 1).max() == 17  # of "three", "seven" and "eight"


def test_the_shipped_model_reads_handwriting_it_was_never_shown(validation):
    model, _ = clip.load(NAME, "cpu")
    images, labels = validation
    assert len(images) == 359
    assert 45 < pretrain.zero_shot_accuracy(model, images, labels) < 75


def test_the_scripts_normalisation_is_that_of_the_loaded_preprocess(validation):
    _, preprocess = clip.load(NAME, "cpu")
    pixels, labels = digits.render()
    images, _ = validation
    first = digits.split_indices(labels)["val"][0]
    torch.testing.assert_close(
        preprocess(Image.fromarray(pixels[first])), pretrain.normalise(images[:1])[0]
    )


def test_every_class_is_drawn_and_every_caption_fits(source):
    fonts = int(source.count[0])
    assert fonts in (21, 22)  # cmti10 is missing in older versions of matplotlib
    assert source.distances.shape == (62 * fonts + 8, 64, 64)
    assert source.count.tolist() == [fonts] * 62 + [1] * 8
    assert (source.distances.amax(dim=(1, 2)) > 0).all()  # some ink
    assert (source.distances[:, 0].amax(dim=1) < 0).all()  # that stays off the edge
    assert len(source.captions) == len(pretrain.CLASSNAMES) * 9 * len(pretrain.TEMPLATES)
    assert len(source.captions.unique(dim=0)) == len(source.captions)


def test_a_batch_is_a_function_of_its_generator_and_all_its_captions_are_true(source):
    batches = [source.batch(1.0, torch.Generator().manual_seed(7)) for _ in range(2)]
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one, other)
    images, tokens, true = batches[0]
    assert images.shape == (pretrain.BATCH, 3, 32, 32)
    assert 0 <= images.min() and images.max() <= 1
    assert true.shape == (len(images), len(tokens))
    assert true.any(dim=0).all() and true.any(dim=1).all()


def test_the_loss_with_one_true_caption_each_is_clips_own():
    logits = torch.randn(6, 6)
    target = torch.arange(6)
    plain = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(pretrain.contrastive_loss(logits, torch.eye(6).bool()), plain)


def test_the_loss_does_not_part_captions_that_are_true_of_the_same_images():
    true = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    even = torch.where(true, 9.0, -9.0)
    apart = even + torch.tensor([[4.0, -4.0, 0.0], [-4.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    assert pretrain.contrastive_loss(even, true) < pretrain.contrastive_loss(apart, true)


def test_a_resumed_pretraining_ends_with_the_same_file(
    signs, validation, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(pretrain, "BATCH", 16)
    monkeypatch.setattr(pretrain, "TEMPLATES", pretrain.TEMPLATES[:2])
    monkeypatch.setattr(pretrain, "draw_signs", lambda: signs)
    monkeypatch.setattr(pretrain, "validation_set", lambda: validation)
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    pretrain.train(whole, seed=5, steps=3)
    pretrain.train(parts, seed=5, steps=3, stop=2)
    assert not parts.exists()
    with pytest.raises(ValueError, match="another --out"):
        pretrain.train(parts, seed=6, steps=3)
    pretrain.train(parts, seed=5, steps=3)
    assert parts.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.pt", "whole.pt"]
    assert hashlib.sha256(whole.read_bytes()).hexdigest() in capsys.readouterr().out
    clip.load(whole, "cpu")
