"""CLIPs with other towers, run by open_clip's modules: against open_clip itself."""

import sys

import numpy as np
import pytest
import torch
from clip_helpers import relative_error
from open_clip_folders import CONFIGS, PREPROCESS, write_folder
from PIL import Image

import clip
from clip.zero_shot import ZeroShotClassifier, tokenize_class_prompts
from datasets import Datum
from datasets.loader import ImageLoader
from optimizers.build import ROLES, build_optimizer, count_roles, mark_as_trainable
from train import evaluate

open_clip = pytest.importorskip("open_clip")
NAMES = ["annual crop", "forest", "industrial buildings"]
DEPTHS = {"siglip": (9, 2), "eva": (12, 2), "coca": (3, 2), "bert": (3, 3), "pooled vit": (3, 2)}


@pytest.fixture(scope="module", params=CONFIGS)
def loaded(request, tmp_path_factory):
    """A kind of model, open_clip's own model, and the adapted one."""
    folder = tmp_path_factory.mktemp("clip") / request.param
    reference = write_folder(request.param, folder)
    return request.param, reference, clip.load(folder, "cpu")[0], folder


@torch.no_grad()
def test_zero_shot_equals_open_clip(loaded, tmp_path):
    kind, reference, model, folder = loaded
    noise, items = np.random.default_rng(0), []
    for i in range(9):
        image = Image.fromarray(noise.integers(0, 256, (3, 3, 3), np.uint8))
        items.append(Datum(str(tmp_path / f"{i}.png"), i % 3, ""))
        image.resize((90 - 7 * i, 40 + 3 * i), Image.Resampling.BICUBIC).save(items[i].impath)
    side = model.visual.input_resolution
    cfg = open_clip.transform.PreprocessCfg(size=side, **PREPROCESS.get(kind, {}))
    theirs = open_clip.transform.image_transform_v2(cfg, is_train=False)
    ours = clip.load(folder, "cpu")[1]
    images = [Image.open(item.impath) for item in items]
    pixels = torch.stack([theirs(image) for image in images])
    assert torch.equal(pixels, torch.stack([ours(image) for image in images]))
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    tokens = tokenizer(NAMES)
    assert torch.equal(tokens, model.tokenize(NAMES))
    assert relative_error(model.encode_image(pixels), reference.encode_image(pixels)) < 1e-5
    assert relative_error(model.encode_text(tokens), reference.encode_text(tokens)) < 1e-5

    templates = ["a photo of a {}.", "{}"]
    tokens = tokenize_class_prompts(model, NAMES, templates)
    classifier = ZeroShotClassifier(model, tokens, logit_scale="checkpoint")
    predictions = evaluate(classifier, ImageLoader(side, resize=model.image_resize), items)
    formats = [template.format for template in templates]
    weight = open_clip.build_zero_shot_classifier(reference, tokenizer, NAMES, formats)
    logits = reference.logit_scale.exp() * reference.encode_image(pixels, normalize=True) @ weight
    probs, preds = logits.softmax(dim=-1).max(dim=-1)
    assert torch.equal(predictions.preds, preds) and relative_error(predictions.probs, probs) < 1e-5


def test_blocks_are_trained_by_role(loaded):
    kind, _, model, _ = loaded
    qkv = 3 if kind == "bert" else 1  # matrices of queries, keys and values in a text block
    vision, text = DEPTHS[kind]
    weights = mark_as_trainable(model, "both", "all")
    assert list(count_roles(weights).values()) == [vision + qkv * text, *[vision + text] * 3]
    assert len(mark_as_trainable(model, "text", "top")) == len(ROLES) - 1 + qkv
    trained = mark_as_trainable(model, "both", "all")
    settings = dict(lr=1e-3, T=5, rank=2, seed=1, density=0.01)
    handle = build_optimizer("so", model, trained, **settings).sampled_gradients
    side = model.visual.input_resolution
    features = model.encode_image(torch.rand(1, 3, side, side))
    (features @ model.encode_text(model.tokenize(NAMES[:1])).T).sum().backward()
    for name, p in trained.items():
        is_linear = ".attn." not in name or ".trunk." in name
        assert p.grad.is_sparse == is_linear  # open_clip's blocks have torch's own attention
    handle.remove()


def test_bad_folders_are_refused(tmp_path, monkeypatch):
    write_folder("bert", tmp_path / "bert")
    model, _ = clip.load(tmp_path / "bert", "cpu")
    with pytest.raises(ValueError, match="more than 24 tokens"):
        model.tokenize("forest " * 30)
    assert model.tokenize("forest " * 30, truncate=True).shape == (1, 24)
    with pytest.raises(ValueError, match="--method lora needs .*CustomTextCLIP"):
        mark_as_trainable(model, "both", "all", "lora")
    for layer in model.text.transformer.encoder.layer:
        layer.attention.self = torch.nn.Identity()
    with pytest.raises(ValueError, match="no matrix of query, key and value .*text tower"):
        mark_as_trainable(model, "both", "all")
    del model.visual.transformer.resblocks
    with pytest.raises(ValueError, match="no matrix of MLP input or .* vision tower"):
        mark_as_trainable(model, "vision", "all")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ValueError, match="cannot build .*transformers.*hf download somebody"):
            clip.load(tmp_path / "bert", "cpu")
    (tmp_path / "bert/vocab.txt").unlink()
    with pytest.raises(ValueError, match="tokenizer is empty.*hf download somebody/bert"):
        clip.load(tmp_path / "bert", "cpu")
