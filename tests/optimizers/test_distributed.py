"""SO in several processes: one seed for all, and what cannot work is refused in one sentence."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from optimizers.sampled import sample_gradients
from optimizers.SparseOptimizer import SO

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def make_model():
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))


@pytest.fixture
def alone():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def in_processes(count, work, folder):
    """Run work(rank) in forked processes of one group; return its results by rank."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def run(rank):
        store = dist.FileStore(str(folder / "store"), count)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
        results.put((rank, work(rank)))
        dist.barrier()
        dist.destroy_process_group()

    processes = [context.Process(target=run, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(count)]


def test_replicas_with_generators_of_their_own_stay_equal_and_use_the_seed_of_rank_0(tmp_path):
    def work(rank):
        torch.manual_seed(7 + rank)
        model = DistributedDataParallel(make_model())
        optimizer = SO(model.parameters(), lr=1e-2, density_ratio=0.05, T=2)
        if rank == 0:  # saves before the first step, without the others
            optimizer.state_dict()
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(4, 32)).square().mean().backward()
            optimizer.step()
        weights = nn.utils.parameters_to_vector(model.parameters()).detach()
        return optimizer.param_groups[0]["seed"], weights.tolist()

    first, second = in_processes(2, work, tmp_path)
    assert first == second


def test_a_given_seed_is_taken_as_it_is(alone):
    optimizer = SO(make_model().parameters(), seed=5)
    optimizer.draw_supports()
    assert optimizer.param_groups[0]["seed"] == 5


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("original", [False, True])
def test_what_fsdp_has_flattened_is_refused(alone, original):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model = fsdp.FullyShardedDataParallel(
        make_model(), use_orig_params=original, device_id=torch.device("cpu")
    )
    with pytest.raises(ValueError, match="shard of FSDP's.*DistributedDataParallel"):
        SO(model.parameters())


def test_dtensors_are_refused(alone):
    tensor = pytest.importorskip("torch.distributed.tensor")
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    whole = tensor.distribute_tensor(torch.ones(4, 4), mesh, [tensor.Shard(0)])
    with pytest.raises(ValueError, match="shard of FSDP's.*DistributedDataParallel"):
        SO([nn.Parameter(whole)])


@pytest.mark.parametrize("order", ["sampled first", "wrapped first", "the wrapper given"])
def test_sampled_gradients_within_distributed_data_parallel_are_refused(alone, order):
    model = make_model()
    optimizer = SO(model.parameters(), density_ratio=0.05)
    wrapped = None if order == "sampled first" else DistributedDataParallel(model)
    with pytest.raises((ValueError, RuntimeError), match="cannot reduce sampled gradients: use"):
        sample_gradients(wrapped if order == "the wrapper given" else model, optimizer)
        (wrapped or DistributedDataParallel(model))(torch.ones(2, 32))
