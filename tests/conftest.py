"""Settings all tests share: one thread, and a seed that no test inherits from another."""

import random
import warnings
from contextlib import nullcontext

import pytest
import torch
from simulated_cuda import simulated_cuda


def pytest_configure():
    torch.set_num_threads(1)  # more than the free cores are many times slower
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older matplotlib uses what newer pyparsing deprecates
        import matplotlib.figure  # noqa: F401


@pytest.fixture(autouse=True)
def seeded_and_simulated(request):
    """Seeds each test; one marked gpu has the simulated device where there is no real one."""
    random.seed(0)
    torch.manual_seed(0)
    is_gpu_test = request.node.get_closest_marker("gpu") is not None
    with simulated_cuda() if is_gpu_test and not torch.cuda.is_available() else nullcontext():
        yield
