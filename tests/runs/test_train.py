"""Which weights are trained, the training loop and its state, the evaluation."""

from contextlib import closing

import numpy as np
import pytest
import torch
from clip_helpers import TINY_RESNET, TINY_VIT, random_state_dict
from helpers import save_and_load
from PIL import Image

import clip
from clip import build_model
from clip.zero_shot import ZeroShotClassifier, tokenize_class_prompts
from datasets import Datum
from datasets.loader import ImageLoader
from optimizers.build import (
    METHODS,
    POSITIONS,
    ROLES,
    build_optimizer,
    layer_indices,
    mark_as_trainable,
    trainable_parameters,
)
from train import TrainConfig, TrainState, cosine_lrs, evaluate, train

NAMES = ["red_one", "green", "blue"]


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """Twelve images of three classes."""
    folder, rng, items = tmp_path_factory.mktemp("images"), np.random.default_rng(0), []
    for number in range(12):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(256, size=(30, 40, 3), dtype=np.uint8)).save(path)
        items.append(Datum(str(path), number % 3, NAMES[number % 3]))
    return items


def make_classifier(model, templates=("a {}.",), **options):
    return ZeroShotClassifier(model, tokenize_class_prompts(model, NAMES, templates), **options)


def build(
    method="so", encoder="both", position="top", lr=1e-3, density=0.05, total_iters=6,
    device="cpu", dtype=torch.float32, precision="fp32", **options,
):  # fmt: skip
    """A classifier, an optimizer of its weights, and a new state."""
    model = build_model(random_state_dict(TINY_VIT)).to(device, dtype)
    weights = mark_as_trainable(model, encoder, position, method)
    optimizer = build_optimizer(method, model, weights, lr=lr, density=density, T=3, rank=2, seed=1)
    state = TrainState(total_iters, torch.device(device), precision)
    return make_classifier(model, precision=precision, **options), optimizer, state


def start(items, classifier, optimizer, state, batches=None, **config):
    """The generator of `train`, on batches of five images unless others are given."""
    loader = ImageLoader(classifier.model.visual.input_resolution, 0, cache_mb=10)
    batches = batches or loader.train_batches(items, 5, seed=1, start=state.iteration)
    config = TrainConfig(optimizer.defaults["lr"], **config)
    return train(classifier, optimizer, batches, state, config)


def train_losses(items, *training, **config):
    """Train to the end; return the losses."""
    for _ in start(items, *training, **config):
        pass
    state = training[-1]
    return state.losses[: state.iteration].tolist()


# Weights to train


def test_layer_indices_of_paper():
    expected = {
        "bottom": range(0, 4), "mid": range(4, 8), "up": range(8, 12), "half-bottom": range(0, 6),
        "half-up": range(6, 12), "all": range(0, 12), "top3": range(9, 12), "top": range(11, 12),
    }  # fmt: skip
    assert {position: layer_indices(position, 12) for position in POSITIONS} == expected


@pytest.mark.parametrize("depth", range(1, 40))
def test_layer_indices_at_any_depth(depth):
    layers = {position: list(layer_indices(position, depth)) for position in POSITIONS}
    assert all(layers.values())
    assert layers["all"] == list(range(depth))
    assert layers["top"] == layers["all"][-1:] and layers["top3"] == layers["all"][-3:]
    if depth >= 2:
        assert layers["half-bottom"] + layers["half-up"] == layers["all"]
    if depth >= 3:
        assert layers["bottom"] + layers["mid"] + layers["up"] == layers["all"]
        sizes = [len(layers[position]) for position in ("bottom", "mid", "up")]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("encoder, towers", [("text", 1), ("vision", 1), ("both", 2)])
def test_mark_as_trainable_freezes_rest(encoder, towers):
    model = build_model(random_state_dict(TINY_VIT))
    weights = mark_as_trainable(model, encoder, "top")
    assert len(weights) == towers * len(ROLES)
    assert trainable_parameters(model).keys() == weights.keys()
    assert all(name.startswith("visual.") for name in weights) == (encoder == "vision")


def test_mark_as_trainable_resnet():
    model = build_model(random_state_dict(TINY_RESNET))
    names = mark_as_trainable(model, "both", "all")
    assert names and not any(name.startswith("visual") for name in names)
    with pytest.raises(ValueError, match="vision tower.*a ResNet has none.*--encoder"):
        mark_as_trainable(model, "vision", "all")


# Classifier and evaluation


def test_tokenize_class_prompts_trims(capsys):
    model = build_model(random_state_dict(TINY_VIT))
    tokens = tokenize_class_prompts(model, NAMES, ["a {}."])
    assert tokens.shape == (1, 3, 10)  # start, a, r e d, o n e, ., end
    assert capsys.readouterr().err == ""
    tokens = tokenize_class_prompts(model, ["x" * 50, "y"], ["a {}."])
    assert tokens.shape == (1, 2, 16) and tokens.max() == tokens[0, 0, -1]
    assert "more than 16 tokens" in capsys.readouterr().err


def test_evaluate_equals_plain_clip(items):
    model = build_model(random_state_dict(TINY_VIT))
    preprocess = clip.image_transform(32)
    images = torch.stack([preprocess(Image.open(item.impath)) for item in items])
    tokens = model.tokenize(["a red one.", "a green.", "a blue."])
    with torch.no_grad():
        probs, preds = model(images, tokens)[0].softmax(dim=-1).max(dim=-1)
    predictions = evaluate(make_classifier(model, logit_scale="checkpoint"), ImageLoader(32), items)
    assert predictions.labels.tolist() == [item.label for item in items]
    assert torch.equal(predictions.preds, preds)
    torch.testing.assert_close(predictions.probs, probs)


# Training


@pytest.mark.parametrize("encoder", ["both", "vision"])
def test_grad_accum_equals_one_batch(encoder, items):
    classifier, *training = build(encoder=encoder, dtype=torch.float64, total_iters=4)
    losses = train_losses(items, classifier, *training)
    for steps in (2, 99):
        other, *training = build(encoder=encoder, dtype=torch.float64, total_iters=4)
        again = train_losses(items, other, *training, grad_accum_steps=steps)
        assert again == pytest.approx(losses, rel=1e-5)
        for p, q in zip(other.model.parameters(), classifier.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_half_precision_follows_float32(items):
    losses = []
    for precision in ("fp32", "bf16", "fp16"):
        classifier, *training = build(lr=1e-4, logit_scale=10.0, precision=precision)
        losses.append(train_losses(items, classifier, *training))
        assert {p.dtype for p in classifier.model.parameters()} == {torch.float32}
    for half in losses[1:]:
        assert half != losses[0] and half == pytest.approx(losses[0], rel=0.05, abs=0.05)


def test_cosine_lrs_fall_to_minimum():
    lrs = cosine_lrs(2e-4, 100)
    assert len(lrs) == 100 and lrs[0] == pytest.approx(2e-4)
    assert lrs[50] == pytest.approx((2e-4 + 1e-6) / 2)
    assert lrs[99] == pytest.approx(1e-6, rel=0.1)


def test_early_stop_after_epoch(items, capsys):
    training = build(encoder="text", total_iters=9)
    assert len(train_losses(items, *training, early_stop_loss=99)) == 3  # twelve images by fives
    assert "after iteration 3 of 9" in capsys.readouterr().out and training[-1].done
    assert len(train_losses(items, *build(encoder="text"), early_stop_loss=-1)) == 6
    assert capsys.readouterr().out == ""


def test_nonfinite_loss_names_iteration(items):
    training = build(encoder="text", lr=1e38, total_iters=9)
    with pytest.raises(FloatingPointError, match="at iteration 2 of 9.*--lr"):
        train_losses(items, *training)
    assert not training[-1].can_checkpoint()


@pytest.mark.parametrize("method", METHODS)
def test_train_pauses_and_resumes_exactly(method, items):
    expected = build(method, total_iters=7)
    losses = train_losses(items, *expected)
    classifier, optimizer, state = build(method, total_iters=7)
    iterations = []
    with closing(start(items, classifier, optimizer, state)) as steps:
        for _ in steps:
            iterations.append(state.iteration)
            evaluate(classifier, ImageLoader(32, 0), items)  # which changes nothing
            if state.iteration == 4:
                break
    assert iterations == [1, 2, 3, 4] and state.can_checkpoint() and not state.done
    saved = save_and_load(
        [classifier.model.state_dict(), optimizer.state_dict(), state.state_dict()]
    )
    resumed = build(method, total_iters=7)
    for part, content in zip((resumed[0].model, *resumed[1:]), saved, strict=True):
        part.load_state_dict(content)
    torch.manual_seed(99)
    assert train_losses(items, *resumed) == losses
    for p, q in zip(resumed[0].model.parameters(), expected[0].model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.gpu
def test_gpu_sync_only_after_epoch(items):
    training = build(position="all", total_iters=9, device="cuda", precision="bf16")
    modes = []

    def batches():
        for batch, ends_epoch in ImageLoader(32).train_batches(items, 5, seed=1):
            # The first epoch warms up.
            modes.append("default" if ends_epoch or len(modes) < 3 else "error")
            torch.cuda.set_sync_debug_mode(modes[-1])
            yield batch, ends_epoch

    try:
        train_losses(items, *training, batches=batches())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert modes.count("error") == 4  # two of three batches in two epochs
