"""Small trainings on random images, in one process or in several."""

import itertools

import torch
from clip_helpers import TINY_VIT, random_state_dict

from clip import build_model
from clip.zero_shot import ZeroShotClassifier, tokenize_class_prompts
from optimizers.build import build_optimizer, mark_as_trainable
from runs.distributed import local_slice
from train import TrainConfig, TrainState, train

NAMES = ["red_one", "green", "blue", "x", "grey"]
BATCH_SIZES = [5, 2, 1]  # of an epoch; the last one leaves processes without an image


def random_batches(resolution=32):
    """Endless random batches, of which a process has its slice of the images."""
    generator = torch.Generator().manual_seed(0)
    for size in itertools.cycle(BATCH_SIZES):
        shape = (size, 3, resolution, resolution)
        images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        labels = torch.randint(len(NAMES), (size,), generator=generator)
        yield (images[local_slice(size)], labels), size == BATCH_SIZES[-1]


def make_classifier(model, templates=("a {}.",), names=NAMES, **options):
    return ZeroShotClassifier(model, tokenize_class_prompts(model, names, templates), **options)


def build(
    config=TINY_VIT, encoder="both", position="top", method="so", lr=1e-3, total_iters=6,
    device="cpu", dtype=torch.float32, precision="fp32", sparse_grad=True, **options,
):  # fmt: skip
    """A classifier, the optimizer of a method, and a new state."""
    model = build_model(random_state_dict(config)).to(device, dtype)
    weights = mark_as_trainable(model, encoder, position, method)
    optimizer = build_optimizer(
        method, model, weights, lr=lr, density=0.02, T=3, rank=2, seed=1, sparse_grad=sparse_grad
    )
    # Above rounding errors: Adam would scale up a gradient that is zero but for rounding.
    optimizer.param_groups[0]["eps"] = 1e-6
    state = TrainState(total_iters, torch.device(device), precision)
    return make_classifier(model, precision=precision, **options), optimizer, state


def train_losses(classifier, optimizer, state, batches=None, **config):
    """Train to the end; return the losses."""
    config = TrainConfig(optimizer.defaults["lr"], **config)
    batches = batches or random_batches(classifier.model.visual.input_resolution)
    for _ in train(classifier, optimizer, batches, state, config):
        pass
    return state.losses[: state.iteration].tolist()
