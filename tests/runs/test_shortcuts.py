"""Everything that training leaves out, against the plain computation, which leaves out nothing.

The plain one (benchmarks/plain.py) runs all tokens of the whole context through all blocks, and
computes every entry of every weight gradient.
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
from optimizers.build import POSITIONS, mark_as_trainable
from optimizers.SampledGradients import sample_gradients
from train import TrainConfig, TrainState, get_lr, train

# What checkpoint of torch 2.4 says of its own autocast.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")
NAMES = ["red_one", "green", "blue", "x", "grey"]
STEPS = 12
CLOSE = dict(rtol=1e-10, atol=1e-10)
# An eps above rounding: Adam would make a step of a gradient that is zero but for rounding.
SETTINGS = dict(lr=1e-3, eps=1e-6, density_ratio=0.02, T=3, seed=1)


def make(config=TINY_VIT, encoder="both", position="all"):
    """A model in float64 and the matrices of it that are to be adapted."""
    model = build_model(random_state_dict(config)).double()
    return model, mark_as_trainable(model, encoder, position)


def make_classifier(model, templates=("a {}.",), **options):
    return ZeroShotClassifier(model, tokenize_class_prompts(model, NAMES, templates), **options)


def batches(resolution, seed=0):
    """Random images and labels for ever, three to a batch."""
    generator = torch.Generator().manual_seed(seed)
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


def train_plainly(model, matrices, templates):
    """STEPS steps of SO as train makes them, with whole gradients; the losses and the optimizer."""
    optimizer = SO(matrices.values(), **SETTINGS)
    losses = []
    for step, (batch, _) in zip(range(STEPS), batches(model.visual.input_resolution), strict=False):
        optimizer.param_groups[0]["lr"] = get_lr(SETTINGS["lr"], step, STEPS)
        loss = plain_loss(model, *batch, templates)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


CASES = [
    *[(TINY_VIT, "both", position, 0, 1) for position in POSITIONS],
    (TINY_VIT, "text", "all", 0, 1),
    (TINY_VIT, "text", "top", 0, 2),
    (TINY_VIT, "vision", "all", 0, 1),
    (TINY_VIT, "both", "all", 2, 1),
    (TINY_VIT, "both", "top", 1, 2),
    (TINY_RESNET, "both", "all", 0, 1),
    (TINY_RESNET, "text", "top", 2, 1),
]


@pytest.mark.parametrize("product_from", [0, 2])  # always and never by way of the whole product
@pytest.mark.parametrize("config, encoder, position, chunk, templates", CASES)
def test_training_equals_the_plain_computation(
    config, encoder, position, chunk, templates, product_from, monkeypatch
):
    monkeypatch.setattr(SampledGradients, "PRODUCT_FROM", product_from)
    templates = ["a {}.", "the {}."][:templates]
    theirs, their_matrices = make(config, encoder, position)
    ours, matrices = make(config, encoder, position)
    losses, their_optimizer = train_plainly(theirs, their_matrices, templates)

    optimizer = SO(matrices.values(), **SETTINGS)
    sample_gradients(ours, optimizer)
    classifier = make_classifier(ours, templates, class_batch_size=chunk)
    assert classifier.text_tokens.shape[-1] < ours.context_length
    state = TrainState(STEPS)
    stream = batches(ours.visual.input_resolution)
    for _ in train(classifier, optimizer, stream, state, TrainConfig(SETTINGS["lr"])):
        pass

    assert state.losses.tolist() == pytest.approx(losses, rel=1e-6)  # kept in float32
    for (name, p), q in zip(matrices.items(), their_matrices.values(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **CLOSE, msg=name)
        at = optimizer.state[p]["grad_indices"]
        assert p.grad.is_sparse and torch.equal(at, their_optimizer.state[q]["grad_indices"])
        torch.testing.assert_close(p.grad.to_dense().take(at), q.grad.take(at), **CLOSE)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert name in matrices or torch.equal(p, q)


def test_micro_batches_of_the_whole_model_add_up():
    (theirs, their_matrices), (ours, matrices) = make(), make()
    optimizer = SO(matrices.values(), **SETTINGS)
    sample_gradients(ours, optimizer)
    classifier = make_classifier(ours, class_batch_size=2)
    classifier.precompute_frozen_text()
    for _, ((images, labels), _) in zip(range(3), batches(32), strict=False):
        plain_loss(theirs, images, labels, ["a {}."]).backward()
        text_features = classifier.encode_classes()
        F.cross_entropy(100 * classifier.encode_images(images) @ text_features.T, labels).backward()
    for p, q in zip(matrices.values(), their_matrices.values(), strict=True):
        at = optimizer.state[p]["grad_indices"]
        torch.testing.assert_close(p.grad.to_dense().take(at), q.grad.take(at), **CLOSE)


def test_what_lies_below_the_first_trained_block_of_the_text_tower_runs_once():
    model, matrices = make(encoder="text", position="top")
    calls = [0, 0]
    for number, block in enumerate(model.transformer.resblocks):
        block.register_forward_hook(lambda *_, n=number: calls.__setitem__(n, calls[n] + 1))
    optimizer = SO(matrices.values())
    for _ in train(
        make_classifier(model), optimizer, batches(32), TrainState(5), TrainConfig(1e-3)
    ):
        pass
    assert calls == [1, 5]


def test_chunks_are_encoded_one_by_one_and_their_activations_not_kept():
    model, _ = make(encoder="text")
    tokens = tokenize_class_prompts(model, [f"no {n}" for n in range(40)], ["a {}."])
    texts, kept = [], []
    model.transformer.resblocks[1].register_forward_hook(lambda m, i, o: texts.append(len(o)))

    def pack(t):
        kept.append(t.nbytes)
        return t

    def bytes_kept(chunk):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            features = ZeroShotClassifier(model, tokens, class_batch_size=chunk).encode_classes()
        features.sum().backward()
        return sum(kept)

    assert bytes_kept(4) < 0.05 * bytes_kept(0)
    assert texts == 20 * [4] + [40]


def test_the_last_block_computes_the_token_that_is_read_alone():
    model, _ = make()
    shapes = {}
    for name, module in model.named_modules():
        if name.endswith(("c_fc", "out_proj")):
            module.register_forward_hook(lambda m, i, o, n=name: shapes.update({n: i[0].shape}))
    model(torch.randn(2, 3, 32, 32), model.tokenize(["a", "bcd"])[:, :5])
    for name, shape in shapes.items():
        last = "visual.transformer.resblocks.3." in name or name.startswith(
            "transformer.resblocks.1"
        )
        assert shape[1] == 1 if last else shape[1] > 1, name
