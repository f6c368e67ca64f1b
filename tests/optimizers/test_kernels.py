"""How many kernels an iteration launches on a GPU, and that it waits for none of them.

Counted on the simulated device: an operator is a kernel, a copy is none.
"""

import pytest
import torch
from clip_helpers import CONFIGS, random_tokens
from simulated_cuda import simulated_cuda

from clip import CLIP
from clip.zero_shot import ZeroShotClassifier
from optimizers.build import build_optimizer, mark_as_trainable
from train import TrainConfig, TrainState, train_step

# As many blocks as ViT-B/16 has, and so as many matrices and kernels; narrow ones are fast.
NARROW = dict(
    CONFIGS["ViT-B/16"], embed_dim=64, image_resolution=32, vision_width=192,
    transformer_width=64, vocab_size=514,
)  # fmt: skip
T = 5
BUDGET = {"fp32": 1300, "bf16": 1750}  # of an iteration that draws no supports


@pytest.mark.parametrize("precision", list(BUDGET))
def test_iteration_keeps_kernel_budget(precision):
    kernels, waits = [], []
    with simulated_cuda() as device:
        model = CLIP(**NARROW).eval().to("cuda")
        weights = mark_as_trainable(model, "both", "all")
        optimizer = build_optimizer(
            "so", model, weights, lr=2e-4, density=4e-4, T=T, rank=2, seed=0
        )
        tokens = random_tokens(model, count=10)[None, :, :24].to("cuda")
        classifier = ZeroShotClassifier(model, tokens, precision=precision)
        classifier.precompute_frozen_text()
        batch = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), torch.tensor([3, 7])
        state = TrainState(100, torch.device("cuda"), precision)
        for _ in range(2 * T):
            device.kernels.clear()
            device.waits.clear()
            train_step(classifier, optimizer, batch, state, TrainConfig(lr=2e-4))
            kernels.append(device.kernels.total())
            waits.append(list(device.waits))
    usual = kernels[T - 1]
    assert usual <= BUDGET[precision]
    assert max(kernels) <= usual + 300  # where it draws; in the first it also makes the state
    assert not any(waits[1:])
