"""Settings all tests share: one thread, and a seed that no test inherits from another."""

import random
import warnings

import pytest
import torch
from simulated_cuda import simulated_cuda


def pytest_configure():
    torch.set_num_threads(1)  # more than the free cores are many times slower
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older matplotlib uses what newer pyparsing deprecates
        import matplotlib.figure  # noqa: F401


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def simulated(request):
    """A test marked gpu runs on the simulated device where there is no real one."""
    if request.node.get_closest_marker("gpu") is None or torch.cuda.is_available():
        yield None
    else:
        with simulated_cuda() as simulation:
            yield simulation
