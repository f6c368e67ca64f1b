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
    BACKBONES["ViT-B/16"], embed_dim=64, image_resolution=32, vision_width=128,
    transformer_width=64, vocab_size=514,
)  # fmt: skip
SETTINGS = dict(encoder="both", position="all", classes=10, batch=2, density=4e-4, text_chunk=0)


@pytest.fixture(params=["fp32", "bf16"])
def costs(request, monkeypatch):
    """Precision; kernels and waits of each iteration of two windows."""
    monkeypatch.setitem(BACKBONES, "narrow", NARROW)
    costs = []
    with simulated_cuda() as device:
        args = Namespace(backbone="narrow", **SETTINGS)
        row = iteration.prepare(f"so:{request.param}", args, torch.device("cuda"))
        for _ in range(2 * T):
            device.kernels.clear()
            device.waits.clear()
            row["iterate"](lambda part: None)
            costs.append((device.kernels.total(), list(device.waits)))
    return request.param, *zip(*costs, strict=True)


def test_an_iteration_keeps_its_budget_of_kernels_and_waits_for_none(costs):
    precision, kernels, waits = costs
    usual, drawing = kernels[T - 1], kernels[T]
    assert usual <= {"fp32": 1300, "bf16": 1750}[precision]
    assert drawing <= usual + 300
    assert not any(waits[1:])
