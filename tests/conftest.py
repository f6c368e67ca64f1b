"""Settings all tests share: one thread, and a seed that no test inherits from another."""

import random
import warnings

import pytest
import torch


def pytest_configure():
    torch.set_num_threads(1)  # more than the free cores are many times slower
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older matplotlib uses what newer pyparsing deprecates
        import matplotlib.figure  # noqa: F401


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; there is none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
