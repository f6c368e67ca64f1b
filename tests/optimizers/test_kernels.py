"""How many kernels an iteration launches on a GPU, and that it waits for none of them.

Counted on the simulated device: an operator is a kernel, a copy is none.
"""

from argparse import Namespace

import pytest
import torch
from simulated_cuda import simulated_cuda

from benchmarks import iteration
from benchmarks.common import BACKBONES, T

# As many blocks as ViT-B/16 has, and so as many matrices and kernels; narrow ones are fast.
NARROW = dict(
    BACKBONES["ViT-B/16"], embed_dim=64, image_resolution=32, vision_width=192,
    transformer_width=64, vocab_size=514,
)  # fmt: skip
SETTINGS = dict(
    encoder="both", position="all", classes=10, batch=2, density=4e-4, class_batch_size=0
)


BUDGET = {"fp32": 1300, "bf16": 1750}  # of an iteration that draws no supports


@pytest.mark.parametrize("precision", list(BUDGET))
def test_an_iteration_keeps_its_budget_of_kernels_and_waits_for_none(precision, monkeypatch):
    monkeypatch.setitem(BACKBONES, "narrow", NARROW)
    kernels, waits = [], []
    with simulated_cuda() as device:
        args = Namespace(backbone="narrow", **SETTINGS)
        row = iteration.prepare(f"so:{precision}", args, torch.device("cuda"))
        for _ in range(2 * T):
            device.kernels.clear()
            device.waits.clear()
            row["iterate"](lambda part: None)
            kernels.append(device.kernels.total())
            waits.append(list(device.waits))
    usual = kernels[T - 1]
    assert usual <= BUDGET[precision]
    assert max(kernels) <= usual + 300  # where it draws; in the first it also makes the state
    assert not any(waits[1:])
