"""The simulated device refuses and waits as CUDA does; a real one, where there is one, too."""

from contextlib import nullcontext

import pytest
import torch
from helpers import forbid_gpu_sync
from simulated_cuda import simulated_cuda
from torch import Tensor, nn

N = 4
MIXTURES = {
    "a sum": lambda x, y: x + y,
    "a product": lambda x, y: x @ y,
    "an array": lambda x, y: x.numpy(),
    "indices": lambda x, y: x.index_select(0, y[0].long()),
    "a generator": lambda x, y: x.normal_(generator=torch.Generator()),
}
WAITS = {
    "item": lambda x: x.sum().item(),
    "to": lambda x: torch.ones(N).to(x.device),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
}
NO_WAITS = {
    "a pinned copy": lambda x: torch.ones(N, N).pin_memory().to(x.device, non_blocking=True),
    "a host's scalar": lambda x: torch.where(x > 0, x * torch.tensor(2.0), torch.tensor(0.0)),
    "a factory": lambda x: torch.arange(N, device=x.device) + torch.zeros(N, device=x.device),
    "sizes": lambda x: x.repeat_interleave(x[0].long(), dim=0, output_size=N),
}


@pytest.mark.gpu
@pytest.mark.parametrize("mix", MIXTURES.values(), ids=MIXTURES)
def test_two_devices_are_refused(mix):
    with pytest.raises((RuntimeError, TypeError)):
        mix(torch.ones(N, N).cuda(), torch.ones(N, N))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*WAITS, *NO_WAITS])
def test_waits_raise_in_debug_mode(name):
    x, error = torch.ones(N, N).cuda(), pytest.raises(RuntimeError, match="synchronizing CUDA")
    with forbid_gpu_sync(), error if name in WAITS else nullcontext():
        (WAITS | NO_WAITS)[name](x)


def test_patches_end_with_device():
    owners = torch, Tensor, torch.cuda, torch.autocast
    before = [dict(vars(owner)) for owner in owners]
    with pytest.raises(ZeroDivisionError), simulated_cuda():
        assert torch.cuda.is_available() and nn.Linear(2, 3).cuda().weight.is_cuda
        raise ZeroDivisionError
    assert [dict(vars(owner)) for owner in owners] == before
