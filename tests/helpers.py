"""What tests of several folders share: a trip through a file, a GPU that must not be waited for."""

import io
from contextlib import contextmanager

import pytest
import torch
from torch import nn


def through_a_file(content):
    """What torch reads, as data alone, of what it has saved."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@contextmanager
def no_wait_for_the_gpu(mode="error"):
    """Make every wait of the host for the device an error."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def clips_sparse_gradients():
    """Whether this version of torch clips sparse gradients on a CPU."""
    probe = nn.Parameter(torch.zeros(2, 2))
    probe.grad = torch.eye(2).to_sparse()
    try:
        nn.utils.clip_grad_norm_([probe], 1.0)
    except NotImplementedError:
        return False
    return True


needs_sparse_clipping = pytest.mark.skipif(
    not clips_sparse_gradients(),
    reason="this version of torch cannot clip sparse gradients on a CPU",
)
