"""Which weights are trained; the training loop against the plain computation; the evaluation."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from clip_helpers import TINY_RESNET, TINY_VIT, random_state_dict
from dataset_helpers import write_image
from helpers import forbid_gpu_sync
from PIL import Image
from train_helpers import NAMES, build, make_classifier, random_batches, train_losses

import clip
from benchmarks import plain
from clip import build_model
from clip.preprocess import normalize
from clip.zero_shot import tokenize_class_prompts
from datasets import Datum
from datasets.loader import ImageLoader
from optimizers import SampledGradients
from optimizers.build import POSITIONS, ROLES, layer_indices, mark_as_trainable
from train import cosine_lrs, evaluate

CLOSE = dict(rtol=1e-10, atol=1e-10)


def test_layer_indices_at_any_depth():
    assert {position: layer_indices(position, 12) for position in POSITIONS} == {
        "bottom": range(0, 4), "mid": range(4, 8), "up": range(8, 12), "half-bottom": range(0, 6),
        "half-up": range(6, 12), "all": range(0, 12), "top3": range(9, 12), "top": range(11, 12),
    }  # fmt: skip
    for depth in range(1, 40):
        layers = {position: list(layer_indices(position, depth)) for position in POSITIONS}
        assert all(layers.values()) and layers["all"] == list(range(depth))
        assert layers["top"] == layers["all"][-1:] and layers["top3"] == layers["all"][-3:]
        if depth >= 3:
            assert layers["half-bottom"] + layers["half-up"] == layers["all"]
            assert layers["bottom"] + layers["mid"] + layers["up"] == layers["all"]


@pytest.mark.parametrize("encoder, towers", [("text", 1), ("vision", 1), ("both", 2)])
def test_mark_as_trainable_freezes_rest(encoder, towers):
    model = build_model(random_state_dict(TINY_VIT))
    weights = mark_as_trainable(model, encoder, "top")
    assert len(weights) == towers * len(ROLES)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == weights.keys()
    assert all(name.startswith("visual.") for name in weights) == (encoder == "vision")


def test_mark_as_trainable_resnet():
    model = build_model(random_state_dict(TINY_RESNET))
    assert not any(name.startswith("visual") for name in mark_as_trainable(model, "both", "all"))
    with pytest.raises(ValueError, match="a ResNet has none"):
        mark_as_trainable(model, "vision", "all")


def test_tokenize_class_prompts_trims(capsys):
    model = build_model(random_state_dict(TINY_VIT))
    tokens = tokenize_class_prompts(model, NAMES, ["a {}."])
    assert tokens.shape == (1, 5, 10)  # start, a, r e d, o n e, ., end
    assert capsys.readouterr().err == ""
    tokens = tokenize_class_prompts(model, ["x" * 50, "y"], ["a {}."])
    assert tokens.shape == (1, 2, 16) and tokens.max() == tokens[0, 0, -1]
    assert "more than 16 tokens" in capsys.readouterr().err


def test_evaluate_equals_plain_clip(tmp_path):
    items = [Datum(str(tmp_path / f"{i}.png"), i % 5, NAMES[i % 5]) for i in range(7)]
    for i, item in enumerate(items):
        write_image(Path(item.impath), item.label, i)
    model, preprocess = build_model(random_state_dict(TINY_VIT)), clip.image_transform(32)
    images = torch.stack([preprocess(Image.open(item.impath)) for item in items])
    tokens = model.tokenize(["a red one.", "a green.", "a blue.", "a x.", "a grey."])
    with torch.no_grad():
        probs, preds = model(images, tokens)[0].softmax(dim=-1).max(dim=-1)
    predictions = evaluate(make_classifier(model, logit_scale="checkpoint"), ImageLoader(32), items)
    assert predictions.labels.tolist() == [item.label for item in items]
    assert torch.equal(predictions.preds, preds)
    torch.testing.assert_close(predictions.probs, probs)


def plain_losses(model, optimizer, templates):
    """Train for five steps, with every token in every block and dense gradients."""
    losses, prompts = [], [[t.format(name.replace("_", " ")) for name in NAMES] for t in templates]
    batches = random_batches(model.visual.input_resolution)
    for lr, ((images, labels), _) in zip(cosine_lrs(1e-3, 5), batches, strict=False):
        optimizer.param_groups[0]["lr"] = lr
        texts = [plain.encode_text(model, model.tokenize(each)) for each in prompts]
        classes = sum(F.normalize(each, dim=-1) for each in texts)
        features = plain.encode_image(model, normalize(images).double())
        loss = plain.cosine_loss(features, classes, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "config, encoder, position, class_batch_size, num_templates, grad_accum_steps",
    [
        (TINY_VIT, "both", "bottom", 0, 1, 1),
        (TINY_VIT, "both", "top3", 0, 1, 2),
        (TINY_VIT, "both", "all", 2, 1, 1),
        (TINY_VIT, "both", "top", 1, 2, 99),
        (TINY_VIT, "text", "all", 0, 1, 1),
        (TINY_VIT, "text", "top", 0, 2, 1),
        (TINY_VIT, "vision", "half-up", 0, 1, 3),
        (TINY_RESNET, "both", "all", 0, 1, 1),
    ],
)
def test_training_equals_plain_computation(
    config, encoder, position, class_batch_size, num_templates, grad_accum_steps, monkeypatch
):
    templates = ["a {}.", "the {}."][:num_templates]
    options = dict(total_iters=5, dtype=torch.float64, templates=templates)
    reference, plain_optimizer, _ = build(config, encoder, position, sparse_grad=False, **options)
    losses = plain_losses(reference.model, plain_optimizer, templates)
    for product_from in (0, 2):  # always and never by way of the dense product
        monkeypatch.setattr(SampledGradients, "DENSE_MATMUL_DENSITY", product_from)
        options["class_batch_size"] = class_batch_size
        classifier, optimizer, state = build(config, encoder, position, **options)
        model = classifier.model
        assert classifier.text_tokens.shape[-1] < model.context_length
        again = train_losses(classifier, optimizer, state, grad_accum_steps=grad_accum_steps)
        assert again == pytest.approx(losses, rel=1e-6)  # stored in float32
        for p, q in zip(model.parameters(), reference.model.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), **CLOSE)
            if p.requires_grad:
                at = optimizer.state[p]["grad_indices"]
                assert p.grad.is_sparse
                assert torch.equal(at, plain_optimizer.state[q]["grad_indices"])
                torch.testing.assert_close(p.grad.to_dense().take(at), q.grad.take(at), **CLOSE)
            else:
                assert torch.equal(p, q)


def test_frozen_text_blocks_run_once():
    classifier, *training = build(encoder="text", total_iters=3)
    calls = [0, 0]
    for number, block in enumerate(classifier.model.transformer.resblocks):
        block.register_forward_hook(lambda *_, n=number: calls.__setitem__(n, calls[n] + 1))
    train_losses(classifier, *training)
    assert calls == [1, 3]


def test_class_batch_size_bounds_activations():
    model = build(encoder="text", position="all", sparse_grad=False)[0].model
    names, saved_bytes = [f"no {n}" for n in range(40)], {0: 0, 4: 0}

    def count_bytes(tensor):
        saved_bytes[size] += tensor.nbytes

    for size in saved_bytes:
        with torch.autograd.graph.saved_tensors_hooks(count_bytes, lambda _: None):
            make_classifier(model, names=names, class_batch_size=size).encode_classes()
    assert saved_bytes[4] < 0.05 * saved_bytes[0]


def test_last_block_computes_one_token():
    model, lengths = build_model(random_state_dict(TINY_VIT)), {}
    for name, module in model.named_modules():
        if name.endswith(("c_fc", "out_proj")):
            module.register_forward_hook(lambda m, i, o, n=name: lengths.update({n: i[0].shape[1]}))
    model(torch.randn(2, 3, 32, 32), model.tokenize(["a", "bcd"])[:, :5])
    assert len(lengths) == 12
    for name, length in lengths.items():
        is_last = name.startswith(("visual.transformer.resblocks.3.", "transformer.resblocks.1."))
        assert (length == 1) == is_last, name


def test_half_precision_follows_float32():
    losses = []
    for precision in ("fp32", "bf16", "fp16"):
        classifier, *training = build(lr=1e-4, logit_scale=10.0, precision=precision)
        losses.append(train_losses(classifier, *training))
        assert {p.dtype for p in classifier.model.parameters()} == {torch.float32}
    for half in losses[1:]:
        assert half != losses[0] and half == pytest.approx(losses[0], rel=0.05, abs=0.05)


def test_cosine_lrs_fall_to_minimum():
    lrs = cosine_lrs(2e-4, 100)
    assert lrs[::50] == pytest.approx([2e-4, (2e-4 + 1e-6) / 2])
    assert len(lrs) == 100 and lrs[-1] == pytest.approx(1e-6, rel=0.1)


def test_early_stop_after_epoch(capsys):
    training = build(encoder="text", total_iters=9)
    assert len(train_losses(*training, early_stop_loss=99)) == 3
    assert "after iteration 3 of 9" in capsys.readouterr().out and training[-1].done
    assert len(train_losses(*build(encoder="text"), early_stop_loss=-1)) == 6
    assert capsys.readouterr().out == ""


@pytest.mark.gpu
def test_gpu_sync_only_after_epoch():
    training, modes = build(total_iters=9, device="cuda", precision="bf16"), []

    def watched_batches():
        for batch, ends_epoch in random_batches():
            # The first epoch warms up.
            modes.append("default" if ends_epoch or len(modes) < 3 else "error")
            torch.cuda.set_sync_debug_mode(modes[-1])
            yield batch, ends_epoch

    with forbid_gpu_sync("default"):
        train_losses(*training, watched_batches())
    assert modes.count("error") == 4  # two of three batches in two epochs
