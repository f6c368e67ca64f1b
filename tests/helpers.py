"""Helpers of several folders of tests."""

import ast
import io
from contextlib import contextmanager

import pytest
import torch
from torch import nn


def imported_names(path):
    """The top-level names that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def save_and_load(content):
    """What torch.load with weights_only=True reads of what torch.save has written."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@contextmanager
def forbid_gpu_sync(mode="error"):
    """Within this context, an operation that makes the host wait for the GPU raises an error."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _can_clip_sparse_gradients():
    probe = nn.Parameter(torch.zeros(2, 2))
    probe.grad = torch.eye(2).to_sparse()
    try:
        nn.utils.clip_grad_norm_([probe], 1.0)
    except NotImplementedError:
        return False
    return True


needs_sparse_clipping = pytest.mark.skipif(
    not _can_clip_sparse_gradients(),
    reason="this version of torch cannot clip sparse gradients on a CPU",
)
