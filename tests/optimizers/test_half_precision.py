"""Weights in bf16 and fp16: stochastic rounding is right on average and repeats."""

import pytest
import torch
from helpers import save_and_load
from simulated_cuda import simulated_cuda
from torch import nn

from optimizers.SparseOptimizer import SO

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
DENSE = pytest.mark.parametrize("dense", [False, True])


def make(values, dense=False, **settings):
    p = nn.Parameter(values)
    settings = dict(density_ratio=0.25, T=2, seed=1) | settings
    return p, SO([{"params": [p], "dense": dense}], **settings)


def run(optimizer, p, steps, seed=0):
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * seed + step)
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def remaining_loss(dtype, dense, **settings):
    """How much is left of |w - target|^2 after 300 steps of lr 1e-5 on weights around 0.02."""
    generator = torch.Generator().manual_seed(0)
    start = 0.02 * torch.randn(64, 64, generator=generator)
    target = start + 1e-3 * torch.randn(64, 64, generator=generator).sign()
    p, optimizer = make(start.to(dtype), dense, lr=1e-5, density_ratio=0.3, **settings)
    begin = (p.detach().float() - target).square().mean()
    for _ in range(300):
        p.grad = (p.detach().float() - target).to(dtype)
        optimizer.step()
    return float((p.detach().float() - target).square().mean() / begin)


@DENSE
def test_small_steps_make_float32s_progress(dense):
    full = 1 - remaining_loss(torch.float32, dense)
    assert full > 0.3
    assert 1 - remaining_loss(torch.bfloat16, dense) > 0.9 * full
    nearest = remaining_loss(torch.bfloat16, dense, stochastic_rounding=False)
    assert 1 - nearest < 0.5 * full


@HALF
@DENSE
@pytest.mark.parametrize("sign", [-1, 1])
def test_rounding_is_unbiased(dtype, dense, sign):
    """One step moves all entries by the same fraction of the distance to the next number."""
    p, optimizer = make(torch.full((200, 200), sign * 1.0, dtype=dtype), dense, lr=1.0)
    gap = torch.finfo(dtype).eps  # between 1 and the next number
    fraction = 0.3
    optimizer.param_groups[0].update(lr=fraction * gap, eps=0.0)
    p.grad = torch.full_like(p, -sign)
    optimizer.step()
    at = slice(None) if dense else optimizer.state[p]["grad_indices"]
    steps = (p.detach().flatten()[at].float() * sign - 1) / gap
    assert steps.unique().tolist() == [0, 1]
    spread = (fraction * (1 - fraction) / len(steps)) ** 0.5
    assert abs(float(steps.mean()) - fraction) < 5 * spread
    assert (p == sign).sum() >= p.numel() - len(steps)


@HALF
@DENSE
def test_representable_results_are_exact(dtype, dense):
    values = torch.cat([torch.randn(300), torch.tensor([0.0, -0.0, 6e-8, -6e-8, 1e-6])])
    before = values.to(dtype).view(5, 61)
    p, optimizer = make(before.clone(), dense, lr=0.0, density_ratio=1.0)
    run(optimizer, p, 3)
    assert torch.equal(p.detach(), before)


@HALF
def test_numbers_beyond_finite_stay_such(dtype):
    values = torch.tensor([[float("inf"), float("nan")], [torch.finfo(dtype).max, -1.0]])
    p, optimizer = make(values.to(dtype), lr=1e-3, density_ratio=1.0)
    p.data[0].neg_()  # a nan of other bits than that of the arithmetic
    run(optimizer, p, 3)
    assert p[0, 0] == -float("inf") and p[0, 1].isnan() and p[1].isfinite().all()


def test_fp16_rounds_below_its_normal_numbers():
    p, optimizer = make(torch.zeros(100, 100, dtype=torch.float16), lr=2.0**-26, eps=0.0)
    p.grad = -torch.ones_like(p)
    optimizer.step()
    moved = p.detach().flatten()[optimizer.state[p]["grad_indices"]]
    assert moved.unique().tolist() == [0, 2.0**-24]
    assert 0.2 < float((moved > 0).float().mean()) < 0.3


@HALF
@DENSE
def test_bits_follow_seed_and_step(dtype, dense):
    def train(seed, disturb=0, resume=False):
        start = torch.randn(40, 30, generator=torch.Generator().manual_seed(3)).to(dtype)
        p, optimizer = make(start, dense, lr=1e-4, seed=seed)
        torch.rand(disturb)
        before = torch.get_rng_state()
        run(optimizer, p, 5)
        if resume:
            state = save_and_load(optimizer.state_dict())
            p, optimizer = make(p.detach().clone(), dense)
            optimizer.load_state_dict(state)
        run(optimizer, p, 4, seed=1)
        assert torch.equal(before, torch.get_rng_state())
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32
        return p.detach()

    assert torch.equal(train(5), train(5, disturb=3))
    assert torch.equal(train(5), train(5, resume=True))
    assert not torch.equal(train(5), train(6))


def test_steps_and_tensors_round_independently():
    shape, gap = (200, 200), torch.finfo(torch.bfloat16).eps
    params = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = SO([{"params": params, "dense": True}], lr=0.5 * gap, seed=1, eps=0.0)
    moves = []
    for _ in range(2):
        for p in params:
            p.data.fill_(1.0)
            p.grad = -torch.ones_like(p)
        optimizer.step()
        moves += [(p.detach() > 1).float().flatten() for p in params]
    agreement = torch.corrcoef(torch.stack(moves)).triu(1).abs().max()
    neighbors = torch.corrcoef(torch.stack([moves[0][1:], moves[0][:-1]]))[0, 1].abs()
    assert max(agreement, neighbors) < 5 / 200


def test_rounding_costs_few_kernels():
    """Each further tensor is read, written and split; the bits of all are computed at once."""

    def kernels(count):
        with simulated_cuda() as device:
            params = [nn.Parameter(torch.ones(40, 50 + i).bfloat16().cuda()) for i in range(count)]
            optimizer = SO(params, density_ratio=0.05, T=9, seed=1)
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            device.kernels.clear()
            device.waits.clear()
            optimizer.step()
            assert not device.waits
            return device.kernels.total()

    assert kernels(20) - kernels(10) <= 10 * 8


@pytest.mark.gpu
@HALF
@DENSE
def test_gpu_rounds_by_same_bits(dtype, dense):
    ours, a = make(torch.ones(64, 96, dtype=dtype), dense, lr=1.0)
    theirs, b = make(torch.ones(64, 96, dtype=dtype).cuda(), dense, lr=1.0)
    for p, optimizer in ((ours, a), (theirs, b)):
        p.grad = torch.ones_like(p)
        optimizer.param_groups[0].update(lr=0.25 * torch.finfo(dtype).eps, eps=0.0)
        optimizer.step()
    assert torch.equal(ours, theirs.cpu())
