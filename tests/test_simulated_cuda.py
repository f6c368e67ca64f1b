"""The simulated device refuses and waits as CUDA does; a real one, where there is one, too."""

import pytest
import torch
from simulated_cuda import simulated_cuda
from torch import Tensor, nn

N = 4

MIXTURES = {
    "a sum": lambda x, y: x + y,
    "a product": lambda x, y: x @ y,
    "a concatenation": lambda x, y: torch.cat([x, y]),
    "a loss": lambda x, y: nn.functional.mse_loss(x, y),
    "an index": lambda x, y: x.take(y.long()),
    "a result": lambda x, y: torch.add(x, x, out=y),
    "a write": lambda x, y: y.add_(x),
    "an array": lambda x, y: x.numpy(),
    "a generator": lambda x, y: x.normal_(generator=torch.Generator()),
    "a factory's generator": lambda x, y: torch.rand(2, device="cuda", generator=torch.Generator()),
    "the device's generator": lambda x, y: y.normal_(generator=torch.Generator(x.device)),
}
WAITS = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: torch.ones(N).to(x.device),
    "copy_": lambda x: x.copy_(torch.ones(N, N)),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "indices": lambda x: x[torch.tensor([0, 1])],
    "repeat_interleave": lambda x: x.repeat_interleave(x[0].long(), dim=0),
    "equal": lambda x: torch.equal(x, x + 1),
}
STAYS_ASYNCHRONOUS = {
    "a pinned copy": lambda x: torch.ones(N, N).pin_memory().to(x.device, non_blocking=True),
    "a host's scalar": lambda x: torch.where(x > 0, x * torch.tensor(2.0), torch.tensor(0.0)),
    "a filled mask": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "a factory": lambda x: torch.arange(N, device=x.device) + torch.zeros(N, device=x.device),
    "its generator": lambda x: x.clone().normal_(generator=torch.Generator(x.device)),
    "sizes": lambda x: x.repeat_interleave(x[0].long(), dim=0, output_size=N),
}


@pytest.fixture
def x():
    return torch.ones(N, N).cuda()


@pytest.fixture
def strict(x):
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("mix", MIXTURES.values(), ids=MIXTURES)
def test_operands_on_two_devices_are_refused(mix, x):
    with pytest.raises((RuntimeError, TypeError)):
        mix(x, torch.ones(N, N))


@pytest.mark.gpu
@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_a_wait_for_the_device_is_an_error_in_debug_mode(wait, x, strict):
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        wait(x)


@pytest.mark.gpu
@pytest.mark.parametrize("work", STAYS_ASYNCHRONOUS.values(), ids=STAYS_ASYNCHRONOUS)
def test_nothing_waits_for_the_device_without_need(work, x, strict):
    work(x)


def test_kernels_and_waits_are_counted_with_the_line_that_caused_them():
    with simulated_cuda() as device:
        x = torch.ones(N, N, device="cuda")
        y = x.view(-1)[1:].add_(1).cpu()
        assert y.device.type == "cpu" and x.is_cuda and nn.Linear(2, 3).cuda().weight.is_cuda
    line = test_kernels_and_waits_are_counted_with_the_line_that_caused_them.__code__.co_firstlineno
    first, second = (f"tests/test_simulated_cuda.py:{line + at}" for at in (2, 3))
    assert device.kernels == {("ones", first): 1, ("add_", second): 1}
    assert device.waits[0] == f"copy to cpu without non_blocking, {second}"


def test_torch_is_as_before_once_the_device_is_gone():
    owners = torch, Tensor, torch.cuda, torch.autocast, torch.profiler
    before = [dict(vars(owner)) for owner in owners]
    with pytest.raises(ZeroDivisionError), simulated_cuda():
        assert torch.cuda.is_available() and vars(Tensor) != before[1]
        with torch.autocast("cuda", torch.bfloat16):
            raise ZeroDivisionError
    assert [dict(vars(owner)) for owner in owners] == before
    assert not torch.is_autocast_enabled("cpu")
