"""Sharded parameters (DTensor, fully_shard) take the step that one process takes on whole tensors.

The checks of one number of ranks run in one launch of as many processes; each test reads its part.
"""

import copy
import warnings
from itertools import product

import pytest
import torch
import torch.distributed as dist
from process_helpers import run_in_processes
from torch import nn

from optimizers.SampledGradients import sample_gradients
from optimizers.SparseOptimizer import SO

checkpoint = pytest.importorskip("torch.distributed.checkpoint")
tensor = pytest.importorskip("torch.distributed.tensor")
if not hasattr(tensor, "distribute_tensor"):
    pytest.skip("torch 2.4 shards no model on CPUs", allow_module_level=True)
fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
DTensor, Partial, Replicate, Shard = (
    getattr(tensor, name) for name in ("DTensor", "Partial", "Replicate", "Shard")
)

STEPS = 7
SETTINGS = dict(lr=1e-2, density_ratio=0.1, T=3, seed=5)
SHAPES = [(13, 10), (1, 40), (2, 9), (5, 4, 6), (7,), (40, 40)]  # uneven, empty on some ranks
LAYOUTS = {  # by number of ranks: the shape of a mesh, and how tensors lie on it
    2: [((2,), [Shard(0)]), ((2,), [Shard(1)]), ((2,), [Replicate()])],
    3: [((3,), [Shard(0)])],
    4: [
        ((2, 2), [Shard(0), Shard(1)]),
        ((2, 2), [Shard(0), Shard(0)]),
        ((2, 2), [Replicate(), Shard(0)]),
        ((2, 2), [Shard(1), Replicate()]),
    ],
}
OPTIONS = [
    dict(weight_decay=0.1, maximize=True),
    dict(weight_decay=0.1, decoupled_weight_decay=True, bias_correction="entry", foreach=False),
]


def whole_tensors(dtype, step=-1):
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]


def train(dtype, place, **options):
    """Weights and optimizer after training on tensors that `place` distributes."""
    params = [nn.Parameter(place(t)) for t in whole_tensors(dtype)]
    groups = [{"params": params[:-1]}, {"params": params[-1:], "dense": True}]
    optimizer = SO(groups, **SETTINGS, **options)
    for step in range(STEPS):
        for p, grad in zip(params, whole_tensors(dtype, step), strict=True):
            p.grad = place(grad)
        optimizer.step()
    return params, optimizer


def whole(t):
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def sparse_states(params, optimizer):
    states = [optimizer.state[p] for p in params]
    return [dict(state) for state in states if "indices" in state]


def check_layouts(ranks):
    """Compare each layout with one process: weights, states, and how often ranks exchange."""
    calls, all_reduce = [], dist.all_reduce

    def counted(row, **how):
        calls.append(row.numel())
        return all_reduce(row, **how)

    for (shape, placements), options, dtype in product(
        LAYOUTS[ranks], OPTIONS, (torch.float64, torch.bfloat16)
    ):
        mesh = dist.device_mesh.init_device_mesh("cpu", shape)

        def place(t, mesh=mesh, placements=placements):
            fitting = [Replicate() if getattr(p, "dim", 0) >= t.dim() else p for p in placements]
            return tensor.distribute_tensor(t, mesh, fitting)

        expected, alone = train(dtype, lambda t: t.clone(), **options)
        calls.clear()
        dist.all_reduce = counted
        params, optimizer = train(dtype, place, **options)
        dist.all_reduce = all_reduce
        tolerance = 1e-12 if dtype == torch.float64 else 0
        for p, q in zip(expected, params, strict=True):
            torch.testing.assert_close(p.detach(), whole(q), rtol=tolerance, atol=tolerance)
        mine, theirs = sparse_states(params, optimizer), sparse_states(expected, alone)
        for one, two in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, two)
        cuts = sum(isinstance(p, Shard) for p in placements)
        assert len(calls) == STEPS * cuts, (options, calls)
        assert all(n == sum(len(s["indices"]) for s in mine) for n in calls)


def make_model(width=13):
    torch.manual_seed(0)
    layers = nn.Linear(9, width), nn.Tanh(), nn.Linear(width, 6, bias=False)
    return nn.Sequential(*layers).double()


def fit(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 9, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def weights(model):
    return torch.cat([whole(p).flatten() for p in model.parameters()])


def sharded_model(ranks):
    model = make_model()
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_fully_shard(ranks):
    model = sharded_model(ranks)
    fit(model, SO(model.parameters(), **SETTINGS), STEPS)
    return weights(model)


def check_tensor_parallel():
    """Both matrices are cut by tensor parallelism first, and then by fully_shard."""
    from torch.distributed.tensor import parallel

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    model = make_model(12)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {"0": parallel.ColwiseParallel(), "2": parallel.RowwiseParallel()}
    parallel.parallelize_module(model, mesh["tp"], plan)
    fully_shard(model, mesh=mesh["dp"])
    fit(model, SO(model.parameters(), **SETTINGS), STEPS)
    return weights(model)


def check_swapped(ranks):
    """As Accelerate does: the optimizer is made first, and its parameters are replaced."""
    model = make_model()
    optimizer = SO(model.parameters(), **SETTINGS)
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
    fully_shard(model, mesh=mesh)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    fit(model, optimizer, STEPS)
    return weights(model)


def check_state_dicts(ranks):
    """A sharded optimizer's state goes into a whole one and back, in the middle of a window."""
    model, alone = sharded_model(ranks), make_model()
    optimizer, whole_one = SO(model.parameters(), **SETTINGS), SO(alone.parameters())
    fit(model, optimizer, 4)
    for p, q in zip(alone.parameters(), model.parameters(), strict=True):
        p.data.copy_(whole(q))
    whole_one.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fit(alone, whole_one, 4, start=4)
    again = sharded_model(ranks)
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        p.detach().to_local().copy_(q.detach().to_local())
    back = SO(again.parameters())
    single = make_model()
    earlier = SO(single.parameters(), **SETTINGS)
    fit(single, earlier, 4)
    back.load_state_dict(earlier.state_dict())
    fit(again, back, 4, start=4)
    return weights(alone), weights(again)


def save_checkpoint(ranks, folder):
    from torch.distributed.checkpoint import state_dict as tools

    model = sharded_model(ranks)
    optimizer = SO(model.parameters(), **SETTINGS)
    fit(model, optimizer, 4)
    states = tools.get_state_dict(model, optimizer)
    checkpoint.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=folder)


def load_checkpoint(model, folder):
    """Weights after training goes on from a checkpoint of other ranks."""
    from torch.distributed.checkpoint import state_dict as tools

    optimizer = SO(model.parameters(), **SETTINGS | {"lr": 7.0})
    states = dict(zip(("model", "optimizer"), tools.get_state_dict(model, optimizer), strict=True))
    checkpoint.load(states, checkpoint_id=folder)
    tools.set_state_dict(
        model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
    )
    fit(model, optimizer, 4, start=4)
    return weights(model)


def check_refusals(ranks):
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
    partial = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()], run_check=False)
    with pytest.raises(ValueError, match="Partial placement"):
        SO([nn.Parameter(partial)])
    model = sharded_model(ranks)
    with pytest.raises(ValueError, match="sampled gradients and shards .* do not go together"):
        sample_gradients(model, SO(model.parameters()))
    model = make_model()
    optimizer = SO(model.parameters(), **SETTINGS)
    sample_gradients(model, optimizer)
    fully_shard(model, mesh=mesh)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.raises(ValueError, match="do not go together"):
        optimizer.step()


def everything(ranks, folder):
    """What each rank found, after all checks of as many ranks; weights by what was trained."""

    def work(rank):
        dist.init_process_group("gloo")
        check_layouts(ranks)
        if ranks == 4:
            return {"tensor parallel": check_tensor_parallel()}
        found = {"fully_shard": check_fully_shard(ranks)}
        found["whole"], found["sharded again"] = check_state_dicts(ranks)
        if ranks == 2:
            found["swapped"] = check_swapped(ranks)
            check_refusals(ranks)
            save_checkpoint(ranks, folder / "two")
        else:
            found["loaded"] = load_checkpoint(sharded_model(ranks), folder / "two")
        return found

    return run_in_processes(ranks, work, folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What all ranks found, by number of ranks; each is launched when it is first asked for."""
    folder, found = tmp_path_factory.mktemp("shards"), {}

    def of(ranks):
        if ranks == 3:  # which load what two have saved
            of(2)
        if ranks not in found:
            found[ranks] = everything(ranks, folder)
        return found[ranks]

    of.folder = folder
    return of


def assert_trained(found, steps=STEPS, width=13):
    model = make_model(width)
    fit(model, SO(model.parameters(), **SETTINGS), steps)
    torch.testing.assert_close(found, weights(model), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ranks, what, settings", [
    (2, "fully_shard", {}), (3, "fully_shard", {}), (2, "swapped", {}),
    (4, "tensor parallel", {"width": 12}), (2, "whole", {"steps": 8}),
    (3, "sharded again", {"steps": 8}), (3, "loaded", {"steps": 8}),
])  # fmt: skip
def test_ranks_equal_one_process(results, ranks, what, settings):
    for found in results(ranks):
        assert_trained(found[what], **settings)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_checkpoint_loads_without_ranks(results):
    results(2)
    assert_trained(load_checkpoint(make_model(), results.folder / "two"), steps=8)
