"""The tiny CLIP that is shipped, and the script that made it."""

import hashlib
import math

import pytest
import torch
from digits import glyphs, pretrain
from torch.nn import functional as F

import clip
from clip.loading import BUNDLED_MODELS, WEIGHTS_DIR

NAME = "ViT-Tiny/8"


@pytest.fixture(scope="module")
def drawn():
    return glyphs.draw_glyphs()


@pytest.fixture
def dataset(drawn, monkeypatch):
    monkeypatch.setattr(glyphs, "draw_glyphs", lambda: drawn)
    return pretrain.GlyphCaptionDataset(clip.CLIP(**pretrain.MODEL_ARGS))


def test_shipped_file_is_half_precision_openai_layout():
    path = WEIGHTS_DIR / "ViT-Tiny-8.pt"
    data = path.read_bytes()
    assert hashlib.sha256(data).hexdigest() == BUNDLED_MODELS[NAME] and len(data) < 2.5e6
    assert BUNDLED_MODELS[NAME] in (path.parent / "README.md").read_text(encoding="utf-8")
    state = torch.load(path, weights_only=True)
    extra = {key: state.pop(key).item() for key in clip.model.EXTRA_KEYS}
    assert extra == {"input_resolution": 32, "context_length": 32, "vocab_size": 514}
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert state.keys() == clip.CLIP(**pretrain.MODEL_ARGS).state_dict().keys()


def test_every_class_and_caption_fits(dataset):
    fonts = int(dataset.count[0])
    assert fonts in (21, 22)  # cmti10 is missing in older versions of matplotlib
    assert dataset.count.tolist() == [fonts] * 62 + [1] * 8
    assert (dataset.distances.amax(dim=(1, 2)) > 0).all()  # some ink
    assert (dataset.distances[:, 0].amax(dim=1) < 0).all()  # that stays off the edge
    assert len(dataset.captions) == len(glyphs.CLASSNAMES) * 9 * len(pretrain.TEMPLATES)
    assert len(dataset.captions.unique(dim=0)) == len(dataset.captions)
    images, tokens, is_match = dataset.batch(1.0, torch.Generator().manual_seed(7))
    assert images.shape == (pretrain.BATCH_SIZE, 3, 32, 32)
    assert is_match.shape == (len(images), len(tokens))
    assert is_match.any(dim=0).all() and is_match.any(dim=1).all()


def test_contrastive_loss_matches_cross_entropy():
    logits, target = torch.randn(6, 6), torch.arange(6)
    plain = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(pretrain.contrastive_loss(logits, torch.eye(6).bool()), plain)
    twice = pretrain.contrastive_loss(logits.repeat(2, 2), torch.eye(6).bool().repeat(2, 2))
    torch.testing.assert_close(twice, plain + math.log(2))  # each has two matches


def test_pretraining_writes_same_file_twice(drawn, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "BATCH_SIZE", 16)
    monkeypatch.setattr(pretrain, "TEMPLATES", pretrain.TEMPLATES[:2])
    monkeypatch.setattr(glyphs, "draw_glyphs", lambda: drawn)
    paths = tmp_path / "one.pt", tmp_path / "two.pt"
    for path in paths:
        pretrain.train(path, seed=5, steps=2)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert hashlib.sha256(paths[0].read_bytes()).hexdigest() in capsys.readouterr().out
    clip.load(paths[0], "cpu")
