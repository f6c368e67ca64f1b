"""SO in several processes: what works, what works with one line more, what is refused and how."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import needs_sparse_clipping
from process_helpers import run_in_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from optimizers.SampledGradients import sample_gradients
from optimizers.SparseOptimizer import SO

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "loops.md"
STEPS, IMAGES = 7, 6  # of which each of two processes has three
settings = dict(lr=1e-2, density_ratio=0.05, T=3)


def make_model(seed=0):
    """Matrices, a bias that is dense, an embedding, a layer that is not used, in float64."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8, bias=False))
    return nn.ModuleDict(dict(embed=nn.Embedding(9, 32), body=body)).double()


def loss_of(model, step, rows=slice(None)):
    """The mean loss of a step's images, or of some of them."""
    generator = torch.Generator().manual_seed(step)
    words = torch.randint(9, (IMAGES,), generator=generator)[rows]
    labels = torch.randint(8, (IMAGES,), generator=generator)[rows]
    return nn.functional.cross_entropy(model["body"](model["embed"](words)), labels)


class Wrapped(nn.Module):
    """The loss as a model's output, as DistributedDataParallel wants it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *arguments):
        return loss_of(self.model, *arguments)


def weights(model):
    """All of a model's numbers, in a row."""
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def share(rank):
    """The rows of a batch that are a process's."""
    return slice(3 * rank, 3 * rank + 3)


def train(model, *optimizers, rows=slice(None), accumulate=1, clip=None, weight=1):
    """Weights after STEPS steps on some rows of each batch, or, with a weight of 0, on none."""
    for step in range(STEPS):
        model.zero_grad()
        for part in range(accumulate) if weight else ():
            loss = loss_of(model, step + 100 * part, rows)
            (weight * loss / accumulate).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
    return weights(model)


def run_twice(work, folder):
    """What work(rank) returns in two processes that form a group."""

    def run(rank):
        dist.init_process_group("gloo")
        return work(rank)

    return run_in_processes(2, run, folder)


def test_replicas_use_rank_0_seed(tmp_path):
    def work(rank):
        torch.manual_seed(7 + rank)
        model = DistributedDataParallel(Wrapped(make_model(rank)))
        optimizer = SO(model.parameters(), **settings)
        if rank == 0:  # saves before the first step, without the others
            optimizer.state_dict()
        for step in range(STEPS):
            optimizer.zero_grad()
            model(step, share(rank)).backward()
            optimizer.step()
        given = SO(model.parameters(), seed=5 + rank)
        given.draw_supports()
        seeds = [o.param_groups[0]["seed"] for o in (optimizer, given)]
        return seeds, weights(model)

    ((seed, given), first), ((other, given_1), second) = run_twice(work, tmp_path)
    assert seed == other and torch.equal(first, second) and (given, given_1) == (5, 6)


@pytest.mark.parametrize(
    "case",
    [dict(), pytest.param(dict(clip=0.1), marks=needs_sparse_clipping), dict(accumulate=2)],
    ids=str,
)
def test_process_group_equals_one_process(case, tmp_path):
    def work(rank):
        model = make_model(rank)  # that of the first process becomes everyone's
        optimizer = SO(model.parameters(), seed=5, **settings)
        sample_gradients(model, optimizer, process_group=dist.group.WORLD)
        sizes, all_reduce = [], dist.all_reduce
        dist.all_reduce = lambda row, **how: (sizes.append(row.numel()), all_reduce(row, **how))
        return train(model, optimizer, rows=share(rank), **case), sizes

    model = make_model()
    optimizer = SO(model.parameters(), seed=5, **settings)
    sample_gradients(model, optimizer)
    expected = train(model, optimizer, **case)
    (first, sizes), (second, _) = run_twice(work, tmp_path)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=1e-10, atol=1e-10)
    # One exchange for each backward pass: the embedding's and the bias's whole gradients, k others.
    row = 9 * 32 + 32 + int(32 * 32 * 0.05) + int(32 * 8 * 0.05)
    assert sizes == [row] * (STEPS * case.get("accumulate", 1))


def test_other_optimizers_parameters_stay_equal(tmp_path):
    def work(rank):
        model = make_model(rank)
        optimizer = SO(model["body"].parameters(), seed=5, **settings)
        other = torch.optim.SGD(model["embed"].parameters(), lr=0.1)
        outside = nn.Parameter(torch.zeros(()))
        optimizer.add_param_group({"params": outside})
        outside.grad = torch.tensor(float(rank))
        sample_gradients(model, optimizer, dist.group.WORLD)
        trained = train(model, optimizer, other, rows=share(rank))
        return torch.cat([trained, outside.detach().view(1)])

    first, second = run_twice(work, tmp_path)
    assert torch.equal(first, second)


def test_idle_process_joins_exchange(tmp_path):
    def work(rank):
        model = make_model()
        optimizer = SO(model.parameters(), seed=5, **settings)
        sample_gradients(model, optimizer, dist.group.WORLD)
        return train(model, optimizer, weight=2 - 2 * rank)

    model = make_model()
    expected = train(model, SO(model.parameters(), seed=5, **settings))
    first, second = run_twice(work, tmp_path)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")  # torch 2.4's own
def test_zero_redundancy_optimizer_takes_so(tmp_path):
    line = re.search(r"^optimizer = ZeroRedundancyOptimizer\(.*\)$", PAGE.read_text(), re.M)[0]

    def work(rank):
        from torch.distributed.optim import ZeroRedundancyOptimizer

        def make(model):
            names = dict(model=model, SO=SO, settings=settings | {"seed": 5})
            exec(line, {"ZeroRedundancyOptimizer": ZeroRedundancyOptimizer}, names)
            return names["optimizer"]

        model = DistributedDataParallel(Wrapped(make_model()))
        pairs = [(model, make(model))]
        for number in range(8):
            if number == 4:
                pairs[0][1].consolidate_state_dict(0)
                saved = [copy.deepcopy(pairs[0][1].state_dict()) if rank == 0 else None]
                dist.broadcast_object_list(saved)  # as through a file
                again = copy.deepcopy(model)
                pairs.append((again, make(again)))
                pairs[1][1].load_state_dict(saved[0])
            for replica, optimizer in pairs:
                optimizer.zero_grad()
                replica(number, share(rank)).backward()
                optimizer.step()
        return weights(model), weights(again)

    (first, again), (second, _) = run_twice(work, tmp_path)
    assert torch.equal(first, second) and torch.equal(first, again)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("original", [False, True])
def test_flattened_parameters_are_refused(original, tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp")

    def work(rank):
        model = fsdp.FullyShardedDataParallel(
            make_model(), use_orig_params=original, device_id=torch.device("cpu")
        )
        with pytest.raises(ValueError, match="flattened by FSDP1.*DistributedDataParallel"):
            SO(model.parameters())

    assert run_twice(work, tmp_path) == [None, None]


@pytest.mark.parametrize("order", ["sampled first", "wrapped first", "the wrapper given"])
def test_ddp_around_sampling_is_refused(order, tmp_path):
    def work(rank):
        model = Wrapped(make_model())
        optimizer = SO(model.parameters(), **settings)
        wrapped = None if order == "sampled first" else DistributedDataParallel(model)
        with pytest.raises((ValueError, RuntimeError), match="cannot reduce sampled gradients"):
            sample_gradients(wrapped if order == "the wrapper given" else model, optimizer)
            (wrapped or DistributedDataParallel(model))(0, share(rank))

    assert run_twice(work, tmp_path) == [None, None]
