"""Training with its shortcuts against the plain computation (benchmarks/plain.py), in float64.

The plain one runs all tokens of the whole context through all blocks, and computes every entry of
every weight gradient.
"""

import pytest
import torch
import torch.nn.functional as F
from clip_helpers import TINY_RESNET, TINY_VIT, random_state_dict

from benchmarks import plain
from clip import build_model
from clip.preprocess import normalize
from clip.zero_shot import ZeroShotClassifier, tokenize_class_prompts
from optimizers import SO, SampledGradients
from optimizers.build import mark_as_trainable
from optimizers.SampledGradients import sample_gradients
from train import TrainConfig, TrainState, cosine_lrs, train

# torch 2.4 warns about its own autocast in torch.utils.checkpoint.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")
NAMES = ["red_one", "green", "blue", "x", "grey"]
STEPS = 5  # with T = 3, two supports
CLOSE = dict(rtol=1e-10, atol=1e-10)
# eps is above rounding errors: Adam would scale up a gradient that is zero but for rounding.
SETTINGS = dict(lr=1e-3, eps=1e-6, density_ratio=0.02, T=3, seed=1)


def build(config=TINY_VIT, encoder="both", position="all", sparse_grad=True):
    """A model in float64, its weights to train, and SO."""
    model = build_model(random_state_dict(config)).double()
    weights = mark_as_trainable(model, encoder, position)
    optimizer = SO(weights.values(), **SETTINGS)
    if sparse_grad:
        sample_gradients(model, optimizer)
    return model, weights, optimizer


def make_classifier(model, templates=("a {}.",), names=NAMES, **options):
    return ZeroShotClassifier(model, tokenize_class_prompts(model, names, templates), **options)


def random_batches(resolution):
    """Endless batches of three random images and labels."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 3, resolution, resolution)
    while True:
        images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        yield (images, torch.randint(len(NAMES), (3,), generator=generator)), False


def plain_loss(model, images, labels, templates):
    """The loss of a batch, with every token of the whole context in every block."""
    texts = [[t.format(name.replace("_", " ")) for name in NAMES] for t in templates]
    features = [plain.encode_text(model, model.tokenize(each)) for each in texts]
    classes = sum(F.normalize(each, dim=-1) for each in features)
    return plain.cosine_loss(plain.encode_image(model, normalize(images).double()), classes, labels)


def train_plainly(model, optimizer, templates):
    """STEPS steps with dense gradients; the losses."""
    losses, batches = [], random_batches(model.visual.input_resolution)
    for step in range(STEPS):
        (images, labels), _ = next(batches)
        optimizer.param_groups[0]["lr"] = cosine_lrs(SETTINGS["lr"], STEPS)[step]
        loss = plain_loss(model, images, labels, templates)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "config, encoder, position, class_batch_size, num_templates",
    [
        (TINY_VIT, "both", "bottom", 0, 1),
        (TINY_VIT, "both", "mid", 0, 1),
        (TINY_VIT, "both", "top3", 0, 1),
        (TINY_VIT, "both", "all", 2, 1),
        (TINY_VIT, "both", "top", 1, 2),
        (TINY_VIT, "text", "all", 0, 1),
        (TINY_VIT, "text", "top", 0, 2),
        (TINY_VIT, "vision", "half-up", 0, 1),
        (TINY_RESNET, "both", "all", 0, 1),
    ],
)
def test_training_equals_plain_computation(
    config, encoder, position, class_batch_size, num_templates, monkeypatch
):
    templates = ["a {}.", "the {}."][:num_templates]
    plain_model, plain_weights, plain_optimizer = build(config, encoder, position, False)
    losses = train_plainly(plain_model, plain_optimizer, templates)
    for product_from in (0, 2):  # always and never by way of the dense product
        monkeypatch.setattr(SampledGradients, "DENSE_MATMUL_DENSITY", product_from)
        model, weights, optimizer = build(config, encoder, position)
        classifier = make_classifier(model, templates, class_batch_size=class_batch_size)
        assert classifier.text_tokens.shape[-1] < model.context_length
        batches, state = random_batches(model.visual.input_resolution), TrainState(STEPS)
        for _ in train(classifier, optimizer, batches, state, TrainConfig(SETTINGS["lr"])):
            pass
        assert state.losses.tolist() == pytest.approx(losses, rel=1e-6)  # stored in float32
        for (name, p), q in zip(weights.items(), plain_weights.values(), strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), **CLOSE, msg=name)
            at = optimizer.state[p]["grad_indices"]
            assert p.grad.is_sparse and torch.equal(at, plain_optimizer.state[q]["grad_indices"])
            torch.testing.assert_close(p.grad.to_dense().take(at), q.grad.take(at), **CLOSE)
        for (name, p), q in zip(model.named_parameters(), plain_model.parameters(), strict=True):
            assert name in weights or torch.equal(p, q), name


def test_frozen_text_blocks_run_once():
    model, _, optimizer = build(encoder="text", position="top")
    calls = [0, 0]
    for number, block in enumerate(model.transformer.resblocks):
        block.register_forward_hook(lambda *_, n=number: calls.__setitem__(n, calls[n] + 1))
    classifier = make_classifier(model)
    for _ in train(classifier, optimizer, random_batches(32), TrainState(3), TrainConfig(1e-3)):
        pass
    assert calls == [1, 3]


def test_class_batch_size_bounds_activations():
    model, *_ = build(encoder="text", sparse_grad=False)
    names, saved_bytes = [f"no {n}" for n in range(40)], {}
    for size in (0, 4):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(tensor.nbytes), lambda _: None
        ):
            make_classifier(model, names=names, class_batch_size=size).encode_classes()
        saved_bytes[size] = sum(saved)
    assert saved_bytes[4] < 0.05 * saved_bytes[0]


def test_last_block_computes_one_token():
    model, *_ = build(sparse_grad=False)
    lengths = {}
    for name, module in model.named_modules():
        if name.endswith(("c_fc", "out_proj")):
            module.register_forward_hook(lambda m, i, o, n=name: lengths.update({n: i[0].shape[1]}))
    model(torch.randn(2, 3, 32, 32).double(), model.tokenize(["a", "bcd"])[:, :5])
    assert len(lengths) == 12
    for name, length in lengths.items():
        is_last = name.startswith(("visual.transformer.resblocks.3.", "transformer.resblocks.1."))
        assert (length == 1) == is_last, name
