"""Which matrices are adapted, the loop against a plain one, and how it ends early."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from clip_helpers import TINY_RESNET, TINY_VIT, random_state_dict
from PIL import Image

import clip
from clip import build_model
from clip.zero_shot import ZeroShotClassifier, tokenize_class_prompts
from datasets import Datum
from datasets.loader import ImageLoader
from optimizers import SO
from optimizers.build import POSITIONS, TRAINABLE_WEIGHTS, layer_indices, mark_as_trainable
from optimizers.SampledGradients import sample_gradients
from train import NonFiniteLoss, TrainConfig, TrainState, evaluate, get_lr, train

NAMES = ["red_one", "green", "blue"]
TEMPLATE = ["a {}."]


@pytest.fixture
def items(tmp_path):
    """Twelve images of three colours."""
    rng = random.Random(0)
    made = []
    for number in range(12):
        label = number % 3
        colour = [rng.randrange(60) for _ in range(3)]
        colour[label] += 160
        path = tmp_path / f"{number}.png"
        Image.effect_noise((40, 30), 60).convert("RGB").save(path)
        image = Image.blend(Image.open(path), Image.new("RGB", (40, 30), tuple(colour)), 0.7)
        image.save(path)
        made.append(Datum(str(path), label, NAMES[label]))
    return made


def tiny(config=TINY_VIT):
    return build_model(random_state_dict(config))


def make_classifier(model, templates=TEMPLATE, **options):
    return ZeroShotClassifier(model, tokenize_class_prompts(model, NAMES, templates), **options)


def fit(model, items, optimizer, state=6, workers=0, logit_scale=100.0, precision="fp32", **config):
    """Train for some iterations, or a state; return the rows of the log."""
    loader = ImageLoader(model.visual.input_resolution, workers, cache_mb=10)
    batches = loader.train_batches(items, 5, seed=1)
    classifier = make_classifier(model, logit_scale=logit_scale, precision=precision)
    if not isinstance(state, TrainState):
        state = TrainState(state, precision=precision)
    config = TrainConfig(optimizer.param_groups[0]["lr"], **config)
    for _ in train(classifier, optimizer, batches, state, config):
        pass
    return state.log_rows(config.lr)


@pytest.mark.parametrize(
    "position, layers",
    [
        ("bottom", range(0, 4)),
        ("mid", range(4, 8)),
        ("up", range(8, 12)),
        ("half-bottom", range(0, 6)),
        ("half-up", range(6, 12)),
        ("all", range(0, 12)),
        ("top3", range(9, 12)),
        ("top", range(11, 12)),
    ],
)
def test_positions_of_twelve_layers_are_the_papers(position, layers):
    assert layer_indices(position, 12) == layers


@pytest.mark.parametrize("depth", range(1, 40))
def test_positions_are_defined_at_every_depth(depth):
    parts = {name: list(layer_indices(name, depth)) for name in POSITIONS}
    everything = list(range(depth))
    assert all(parts.values())
    assert parts["all"] == everything
    assert parts["top"] == everything[-1:] and parts["top3"] == everything[-3:]
    if depth >= 2:
        assert parts["half-bottom"] + parts["half-up"] == everything
    if depth >= 3:
        assert parts["bottom"] + parts["mid"] + parts["up"] == everything
        sizes = [len(parts[name]) for name in ("bottom", "mid", "up")]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("encoder, towers", [("text", 1), ("vision", 1), ("both", 2)])
def test_only_the_named_matrices_of_the_chosen_towers_are_thawed(encoder, towers):
    model = tiny()
    chosen = mark_as_trainable(model, encoder, "top")
    assert len(chosen) == towers * len(TRAINABLE_WEIGHTS)
    thawed = {name for name, p in model.named_parameters() if p.requires_grad}
    assert thawed == set(chosen)
    assert all(name.startswith("visual.") for name in chosen) == (encoder == "vision")


def test_a_resnet_adapts_its_text_tower_and_refuses_vision_alone():
    names = mark_as_trainable(tiny(TINY_RESNET), "both", "all")
    assert names and not any(name.startswith("visual") for name in names)
    with pytest.raises(ValueError, match="ResNet"):
        mark_as_trainable(tiny(TINY_RESNET), "vision", "all")


def test_the_classifier_is_the_normalised_text_of_each_prompt():
    model = tiny()
    features = make_classifier(model).encode_classes()
    expected = model.encode_text(model.tokenize(["a red one.", "a green.", "a blue."]))
    torch.testing.assert_close(features, F.normalize(expected, dim=-1))
    both = make_classifier(model, ["a {}.", "the {}."]).encode_classes()
    other = make_classifier(model, ["the {}."]).encode_classes()
    torch.testing.assert_close(both, F.normalize(features + other, dim=-1))


def test_prompts_are_as_long_as_the_longest_and_cut_to_the_context(capsys):
    model = tiny()
    assert make_classifier(model).text_tokens.shape == (1, 3, 10)  # start, a, r e d, o n e, ., end
    assert capsys.readouterr().err == ""
    tokens = tokenize_class_prompts(model, ["x" * 50, "y"], TEMPLATE)
    assert tokens.shape == (1, 2, 16) and tokens.max() == tokens[0, 0, -1]
    assert "more than 16 tokens" in capsys.readouterr().err


def test_evaluation_is_plain_clip_on_clips_own_preprocessing(items):
    model = tiny()
    preprocess = clip.image_transform(32)
    images = torch.stack([preprocess(Image.open(item.impath)) for item in items])
    tokens = model.tokenize(["a red one.", "a green.", "a blue."])
    with torch.no_grad():
        predicted = model(images, tokens)[0].argmax(dim=-1)
    expected = 100 * sum(int(p == i.label) for p, i in zip(predicted, items, strict=True)) / 12
    for workers in (0, 2):
        found = evaluate(make_classifier(model), ImageLoader(32, workers), items)
        assert found.accuracy == pytest.approx(expected)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_a_run(items, workers):
    curves = []
    for count in (0, workers):
        model = tiny()
        optimizer = SO(mark_as_trainable(model, "both", "top").values(), lr=1e-3, seed=1)
        curves.append(fit(model, items, optimizer, workers=count))
    assert curves[0] == curves[1]


@pytest.mark.parametrize("encoder", ["both", "vision"])
def test_parts_of_a_batch_add_up_to_its_gradient(items, encoder):
    def run(**options):
        model = tiny().double()
        optimizer = SO(mark_as_trainable(model, encoder, "top").values(), lr=1e-3, seed=1)
        sample_gradients(model, optimizer)
        curve = fit(model, items, optimizer, **options)
        return [row[1] for row in curve], model.visual.transformer.resblocks[-1].mlp.c_fc.weight

    losses, weight = run()
    for parts in (2, 3, 99):
        again, other = run(grad_accum_steps=parts)
        assert again == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(other, weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_float32_with_float32_weights(items, precision):
    curves = []
    for name in ("fp32", precision):
        model = tiny()
        chosen = mark_as_trainable(model, "both", "all")
        optimizer = SO(chosen.values(), lr=1e-4, density_ratio=0.1, seed=1)
        curves.append(fit(model, items, optimizer, logit_scale=10.0, precision=name))
        assert {p.dtype for p in chosen.values()} == {torch.float32}
    full, half = [torch.tensor([row[1] for row in curve]) for curve in curves]
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)


def test_the_checkpoints_own_logit_scale_can_be_used(items):
    losses = []
    for scale in ("checkpoint", 100.0, 1.0):
        model = tiny()  # whose own scale is 100
        optimizer = SO(mark_as_trainable(model, "text", "top").values(), seed=1)
        losses.append(fit(model, items, optimizer, 1, logit_scale=scale)[0][1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] != losses[2]


def test_training_stops_after_an_epoch_below_the_loss_asked_for(items):
    model = tiny()
    optimizer = SO(mark_as_trainable(model, "text", "top").values(), seed=1)
    curve = fit(model, items, optimizer, 20, early_stop_loss=1e9)
    assert [row[0] for row in curve] == [1, 2, 3]  # twelve images, five to a batch


def test_a_loss_that_is_not_finite_names_its_iteration_and_keeps_the_curve(items):
    model = tiny()
    optimizer = SO(mark_as_trainable(model, "text", "top").values(), lr=1e38, seed=1)
    state = TrainState(9)
    with pytest.raises(NonFiniteLoss, match="at iteration 2 of 9.*--lr"):
        fit(model, items, optimizer, state)
    assert [math.isfinite(row[1]) for row in state.log_rows(1e38)] == [True, False]


def test_the_schedule_starts_at_lr_and_ends_at_1e_minus_6():
    assert get_lr(2e-4, 0, 100) == pytest.approx(2e-4)
    assert get_lr(2e-4, 50, 100) == pytest.approx((2e-4 + 1e-6) / 2)
    assert get_lr(2e-4, 100, 100) == pytest.approx(1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_iteration_on_a_gpu_waits_at_the_end_of_an_epoch_alone(items, precision):
    model = tiny().cuda()
    optimizer = SO(mark_as_trainable(model, "both", "all").values(), density_ratio=0.05, seed=1)
    fit(
        model, items, optimizer, TrainState(3, torch.device("cuda"), precision), precision=precision
    )
    modes = []

    def watched(batches):
        for batch, ends_epoch in batches:
            modes.append("default" if ends_epoch or len(modes) == 39 else "error")
            torch.cuda.set_sync_debug_mode(modes[-1])
            yield batch, ends_epoch

    batches = watched(ImageLoader(32).train_batches(items, 5, seed=1))
    state = TrainState(40, torch.device("cuda"), precision)
    try:
        classifier = make_classifier(model, precision=precision)
        for _ in train(classifier, optimizer, batches, state, TrainConfig(2e-4)):
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert modes.count("error") == 26  # two of three batches
