"""SO in other people's loops: the README's, killed and resumed, and torch's neighbours."""

import copy
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import needs_sparse_clipping, save_and_load
from loops_run import IMPORTS, STEPS, T
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR
from torch.utils._pytree import tree_flatten
from twin import Twin, mask

from optimizers.SampledGradients import sample_gradients
from optimizers.SparseOptimizer import SO

TESTS = Path(__file__).parent
CLOSE = dict(rtol=1e-10, atol=1e-12)
# An eps above rounding: Adam would make a step of a gradient that is zero but for rounding.
SETTINGS = dict(lr=1e-2, eps=1e-4, weight_decay=0.01, density_ratio=0.05, T=T)
HALFWAY = 7  # steps: the second of the second window
BOTH = pytest.mark.parametrize("sample", [False, pytest.param(True, marks=needs_sparse_clipping)])


def make(sample, model=None):
    """A model in float64 and its optimizer, of sampled gradients or not."""
    model = model or nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.LayerNorm(40), nn.Linear(40, 5))
    optimizer = SO(model.double().parameters(), **SETTINGS)
    if sample:
        sample_gradients(model, optimizer)
    return model, optimizer


def backward(model, step):
    """Two batches, which depend on the step only, clipped."""
    generator = torch.Generator().manual_seed(step)
    for inputs in torch.randn(2, 3, 12, generator=generator, dtype=torch.float64):
        model(inputs).square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def twin_of(p):
    return Twin(p, **{name: SETTINGS[name] for name in ("lr", "eps", "weight_decay")})


def assert_identical(a, b):
    """Equal bit for bit, types and keys included."""
    (leaves, structure), (others, other) = tree_flatten(a), tree_flatten(b)
    assert structure == other and list(map(type, leaves)) == list(map(type, others))
    for leaf, value in zip(leaves, others, strict=True):
        if isinstance(leaf, torch.Tensor):
            assert leaf.dtype == value.dtype and torch.equal(leaf, value)
        else:
            assert leaf == value


# The README's loops


def installed(loop):
    return importlib.util.find_spec(IMPORTS[loop].split(".")[0]) is not None


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder in which all loops that can run here have run, in processes of their own."""
    folder = tmp_path_factory.mktemp("loops")
    done = subprocess.run(
        [sys.executable, TESTS / "loops_run.py", folder, *filter(installed, IMPORTS)],
        # Libraries take a GPU, or several, without being asked.
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@BOTH
@pytest.mark.parametrize("loop", IMPORTS)
def test_killed_loop_continues_bit_exactly(loop, sample, request):
    if not installed(loop):
        pytest.skip(f"needs {IMPORTS[loop].split('.')[0]}, which is not installed")
    folder = request.getfixturevalue("runs") / (f"{loop}-sampled" if sample else loop)
    logs = {path.parent.name: path.read_text(errors="replace") for path in folder.glob("*/log.txt")}
    assert json.loads((folder / "codes.json").read_text()) == [0, -signal.SIGKILL, 0], logs
    unbroken, resumed = (
        torch.load(folder / name / "final.pt", weights_only=True) for name in ("unbroken", "killed")
    )
    assert_identical(unbroken, resumed)
    assert unbroken["sparse"] == sample
    assert {int(state["step"]) for state in unbroken["optimizer"]["state"].values()} == {STEPS}


# Torch's own neighbours


SCHEDULERS = {
    "one cycle, momentum too": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "swa": lambda o: SWALR(o, 1e-3, anneal_epochs=10),
}


@BOTH
@pytest.mark.parametrize("name", SCHEDULERS)
def test_saved_schedule_continues_bit_exactly(name, sample):
    def start():
        model, optimizer = make(sample)
        return model, optimizer, SCHEDULERS[name](optimizer)

    def train(parts, steps):
        model, optimizer, scheduler = parts
        for step in steps:
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step(*[1.0] * (name == "plateau"))

    def states(parts):
        # SWALR's state names its annealing function, which no file read as data can hold.
        return [{k: v for k, v in part.state_dict().items() if not callable(v)} for part in parts]

    unbroken, resumed = start(), start()
    train(unbroken, range(HALFWAY))
    for part, state in zip(resumed, save_and_load(states(unbroken)), strict=True):
        part.load_state_dict(state)
    for parts in (unbroken, resumed):
        train(parts, range(HALFWAY, STEPS))
    assert_identical(states(unbroken), states(resumed))
    assert unbroken[1].param_groups[0]["lr"] != SETTINGS["lr"]


class Tied(nn.Module):
    """One matrix embeds words, and tells them; another is used twice, once not by its layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 30)
        self.head.weight, self.second.weight = self.embed.weight, self.first.weight

    def forward(self, words):
        x = self.first(self.embed(words)).tanh()
        x = F.linear(x, weight=self.second.weight, bias=self.second.bias)
        return self.head(x.tanh())


@BOTH
def test_tied_weights_sum_gradients(sample):
    model, optimizer = make(sample, Tied())
    assert len(optimizer.param_groups[0]["params"]) == 5
    apart = copy.deepcopy(model)
    apart.head.weight, apart.second.weight = (
        nn.Parameter(p.detach().clone()) for p in (model.head.weight, model.second.weight)
    )
    pairs = [(model.embed.weight, "embed", "head"), (model.first.weight, "first", "second")]
    twins = [twin_of(p) for p, *_ in pairs]
    for _ in range(STEPS):
        words, targets = torch.randint(30, (2, 2, 8))
        apart.load_state_dict(model.state_dict())
        for net in (model, apart):
            net.zero_grad()
            for batch, target in zip(words, targets, strict=True):
                F.cross_entropy(net(batch), target).backward()
        optimizer.step()
        assert model.first.weight.grad.is_sparse == sample
        assert not model.embed.weight.grad.is_sparse  # which is used otherwise, too
        for (p, one, other), twin in zip(pairs, twins, strict=True):
            gradient = getattr(apart, one).weight.grad + getattr(apart, other).weight.grad
            twin.step(gradient, mask(optimizer.state[p]["grad_indices"], p.shape))
            torch.testing.assert_close(p.detach(), twin.W, **CLOSE)


FROZEN = {0: {1, 2, 6}, 3: {0, 1, 2, 3, 9, 10}}  # steps in which a layer's matrix is frozen


@BOTH
@pytest.mark.parametrize("how", ["requires_grad", "grad is None"])
def test_frozen_matrix_resumes(how, sample):
    model, optimizer = make(sample)
    twins = {number: twin_of(model[number].weight) for number in FROZEN}
    seen = {number: [] for number in FROZEN}
    for step in range(16):
        for number, steps in FROZEN.items():
            model[number].weight.requires_grad_(step not in steps or how != "requires_grad")
        backward(model, step)
        frozen = [model[number].weight for number, steps in FROZEN.items() if step in steps]
        for p in frozen:
            p.grad = None
        before = copy.deepcopy([(p, optimizer.state[p]) for p in frozen])
        optimizer.step()
        assert_identical(before, [(p, optimizer.state[p]) for p in frozen])
        for number, twin in twins.items():
            if step not in FROZEN[number]:
                p = model[number].weight
                support = optimizer.state[p]["grad_indices"]
                seen[number].append(support.tolist())
                twin.step(p.grad.to_dense(), mask(support, p.shape))
                torch.testing.assert_close(p.detach(), twin.W, **CLOSE)
        optimizer.zero_grad()
    for supports in seen.values():  # a window is T steps of the matrix, not of the optimizer
        windows = [supports[start : start + T] for start in range(0, len(supports), T)]
        assert all(support == window[0] for window in windows for support in window)
        assert len({tuple(window[0]) for window in windows}) == len(windows)
