"""SO against its plain twin and torch's Adam, its state, and what it refuses."""

import ast
import copy
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import forbid_gpu_sync, save_and_load
from torch import nn
from twin import Twin, mask

from optimizers import SparseOptimizer
from optimizers.SparseOptimizer import SO, draw_support

ROOT = Path(__file__).parents[2]
SHAPES = [(7, 9), (3, 4, 5), (2, 3, 3, 3), (2, 2, 2, 3, 2)]
SPARSE_STATE = {"step", "grad_indices", "indices", "exp_avg", "exp_avg_sq"}


def parameter(*shape, dtype=torch.float64):
    return nn.Parameter(torch.randn(shape, dtype=dtype))


def run(optimizer, params, steps, seed=0):
    """Some steps on gradients that depend on the seed and the step alone."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()


# Equalities


OPTIONS = [
    dict(weight_decay=0.1),
    dict(weight_decay=0.1, maximize=True),
    dict(weight_decay=0.1, decoupled_weight_decay=True),
    dict(bias_correction="entry"),
    dict(bias_correction="entry", betas=(0.0, 0.95)),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("density, T", [(0.01, 1), (0.1, 5), (0.3, 2), (1.0, 4)])
@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("large", [False, True])
def test_every_step_equals_the_twins(options, density, T, foreach, large, monkeypatch):
    """All tensors of one optimizer, some of them without a gradient in some steps."""
    if large:  # united by a table and selected by counting
        monkeypatch.setattr(SparseOptimizer, "LARGE", 1)
    dtype, close = (torch.float32, 1e-5) if large else (torch.float64, 1e-12)
    params = [parameter(*shape, dtype=dtype) for shape in SHAPES]
    settings = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6) | options
    twins = [Twin(p, **settings) for p in params]
    optimizer = SO(params, **settings, density_ratio=density, T=T, seed=3, foreach=foreach)
    for step in range(9):
        for number, p in enumerate(params):
            p.grad = None if (step + number) % 7 == 6 else torch.randn_like(p)
        gradients = [None if p.grad is None else p.grad.clone() for p in params]
        optimizer.step()
        for p, twin, gradient in zip(params, twins, gradients, strict=True):
            if gradient is None:
                continue
            state, at = optimizer.state[p], optimizer.state[p]["indices"]
            twin.step(gradient, mask(state["grad_indices"], p.shape))
            assert torch.equal(p.grad, gradient)
            torch.testing.assert_close(p.detach(), twin.W, rtol=close, atol=close)
            assert torch.equal(mask(at, p.shape), twin.S_m), step
            torch.testing.assert_close(state["exp_avg"], twin.m.flatten()[at], rtol=close, atol=0)
            torch.testing.assert_close(
                state["exp_avg_sq"], twin.v.flatten()[at], rtol=close, atol=0
            )
            if "bias_correction" in options:
                assert torch.equal(state["entry_steps"], twin.t.flatten()[at].long())


@pytest.mark.parametrize("select", [SparseOptimizer._topk, SparseOptimizer._topk_by_counting])
def test_topk_leaves_void_slots(select):
    for score in (torch.rand(1000) * 1e-30, torch.randint(3, (1000,)).double()):
        score[::7] = -1.0
        for k in (1, 400, 857):
            positions = select(
                score.view(torch.int32 if score.itemsize == 4 else torch.int64), [(1000, k)]
            )
            assert len(positions.unique()) == k
            assert torch.equal(score[positions].sort().values, score.topk(k).values.flip(0))


@pytest.mark.parametrize("large", [1, 2**13])
def test_equal_moments_do_not_depend_on_company(large, monkeypatch):
    """As of an embedding's rows, most gradients are 0, and so are moments that stay."""
    monkeypatch.setattr(SparseOptimizer, "LARGE", large)

    def train(foreach):
        torch.manual_seed(0)
        params = [parameter(60, 40) for _ in range(3)]
        optimizer = SO(params, density_ratio=0.1, T=3, seed=1, foreach=foreach)
        for _ in range(9):
            for p in params:
                p.grad = torch.randn(60, 40).double() * (torch.rand(60, 1) < 0.1)
            optimizer.step()
        return [set(optimizer.state[p]["indices"].tolist()) for p in params]

    assert train(True) == train(False)


def test_chunks_change_nothing(monkeypatch):
    def train(limit):
        monkeypatch.setattr(SparseOptimizer, "CHUNK", limit)
        torch.manual_seed(0)
        params = [parameter(20 + i, 30) for i in range(6)]
        run(SO(params, lr=1e-2, density_ratio=0.1, T=2, seed=1), params, 5)
        return params

    for limit in (1, 300):
        assert all(map(torch.equal, train(limit), train(10**9)))


@pytest.mark.parametrize("correction", ["tensor", "entry"])
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}], ids=str
)
@pytest.mark.parametrize("decoupled", [False, True])
def test_density_one_equals_adam(correction, options, decoupled):
    ours, theirs = [[parameter(30, 20), parameter(5, 4, 3)] for _ in range(2)]
    for a, b in zip(ours, theirs, strict=True):
        b.data.copy_(a.data)
    settings = dict(lr=1e-2, decoupled_weight_decay=decoupled)
    so = SO(ours, **settings, density_ratio=1.0, T=3, bias_correction=correction, **options)
    run(so, ours, 30)
    adam = torch.optim.AdamW if decoupled else torch.optim.Adam
    run(adam(theirs, **{"lr": 1e-2, "weight_decay": 0.0, **options}), theirs, 30)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_dense_tensors_are_exactly_adam(dtype, decoupled, maximize, foreach):
    ours = [parameter(9, dtype=dtype), parameter(4, 5, dtype=dtype)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    settings = dict(lr=1e-2, weight_decay=0.01, maximize=maximize, foreach=foreach)
    a = SO([{"params": ours, "dense": True}], decoupled_weight_decay=decoupled, **settings)
    b = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **settings)
    run(a, ours, 20)
    run(b, theirs, 20)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(a.state[p][name], b.state[q][name])


@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize("rows", [True, False])
def test_coo_gradients_equal_strided_ones(coalesced, rows):
    dense, sparse = [parameter(8, 6) for _ in range(2)]
    sparse.data.copy_(dense.data)
    a = SO([dense], lr=1e-2, density_ratio=0.2, T=2, seed=1)
    b = SO([sparse], lr=1e-2, density_ratio=0.2, T=2, seed=1)
    for count in (5, 9, 0, 20, 3, 1):  # entries, or rows
        sparse.grad = torch.sparse_coo_tensor(
            torch.randint(8, (1, count)) if rows else torch.randint(6, (2, count)),
            torch.randn(count, 6) if rows else torch.randn(count),
            (8, 6),
            dtype=torch.float64,
            check_invariants=True,
        )
        if coalesced:
            sparse.grad = sparse.grad.coalesce()
        dense.grad = sparse.grad.to_dense()
        a.step()
        b.step()
        torch.testing.assert_close(dense, sparse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "strided", [lambda w: w.t(), lambda w: w[:, ::2], lambda w: w.expand(1, *w.shape).mT]
)
@pytest.mark.parametrize("dense, dtype", [(False, torch.float64), (True, torch.bfloat16)])
def test_strided_parameters_update_in_place(strided, dense, dtype):
    storage = torch.randn(10, 12, dtype=dtype)
    w = nn.Parameter(strided(storage))
    assert not w.is_contiguous() and w.data_ptr() == storage.data_ptr()
    plain = nn.Parameter(w.detach().clone(memory_format=torch.contiguous_format))
    settings = dict(lr=1e-2, density_ratio=0.2, T=2, weight_decay=0.1, seed=1, dense=dense)
    a, b = (SO([settings | {"params": [p]}]) for p in (w, plain))
    for _ in range(6):
        plain.grad = torch.randn_like(plain)
        w.grad = plain.grad.clone() if _ % 2 else torch.empty_like(w).copy_(plain.grad)
        a.step()
        b.step()
    assert torch.equal(w, plain)
    assert torch.equal(strided(storage), w)


# Supports


@pytest.mark.parametrize("numel, k", [(10, 1), (10, 3), (10, 9), (10, 10), (1000, 37), (3, 1)])
def test_supports_are_distinct_and_uniform(numel, k):
    generator = torch.Generator().manual_seed(0)
    draws = 3000
    counts = torch.zeros(numel)
    for _ in range(draws):
        support = draw_support(numel, k, generator)
        assert support.dtype == torch.int64 and len(support.unique()) == k
        counts[support] += 1
    expected = draws * k / numel
    spread = (expected * (1 - k / numel)) ** 0.5
    assert (counts - expected).abs().max() <= 5 * spread


def test_support_lasts_T_steps():
    w = parameter(30, 40)
    optimizer = SO([w], density_ratio=0.0146, T=3)
    seen = []
    for _ in range(9):
        run(optimizer, [w], 1)
        seen.append(optimizer.state[w]["grad_indices"].tolist())
        assert len(seen[-1]) == len(optimizer.state[w]["indices"]) == 17
    assert [seen[i] == seen[i + 1] for i in range(8)] == [True, True, False] * 2 + [True, True]


def test_tensors_steps_and_optimizers_draw_independently():
    params = [parameter(40, 40) for _ in range(3)]
    optimizers = [SO(params, density_ratio=0.01, T=1) for _ in range(2)]
    seen = set()
    for optimizer in optimizers:
        for _ in range(5):
            run(optimizer, params, 1)
            seen |= {tuple(optimizer.state[p]["grad_indices"].tolist()) for p in params}
    assert len(seen) == 2 * 5 * 3


def test_seeded_supports_leave_global_generator():
    def supports(disturbance):
        w = parameter(30, 30)
        optimizer = SO([w], density_ratio=0.05, T=2, seed=7)
        torch.rand(disturbance)
        before = torch.get_rng_state()
        optimizer.draw_supports()
        assert torch.equal(before, torch.get_rng_state())
        w.grad = torch.randn_like(w)
        before = torch.get_rng_state()
        optimizer.step()
        assert torch.equal(before, torch.get_rng_state())
        return optimizer.state[w]["grad_indices"]

    assert torch.equal(supports(3), supports(5))


def test_unseeded_supports_follow_manual_seed():
    def supports(seed):
        w = nn.Parameter(torch.zeros(30, 30))
        optimizer = SO([w], density_ratio=0.05)
        torch.manual_seed(seed)
        w.grad = torch.ones_like(w)
        optimizer.step()
        return optimizer.state[w]["grad_indices"].tolist()

    assert supports(1) == supports(1) != supports(2)


def test_draw_supports_precedes_step():
    drawn, plain = parameter(30, 30), parameter(30, 30)
    frozen = parameter(5, 5).requires_grad_(False)
    plain.data.copy_(drawn.data)
    a = SO([drawn, frozen], density_ratio=0.05, T=2, seed=7)
    b = SO([plain], density_ratio=0.05, T=2, seed=7)
    for _ in range(5):
        a.draw_supports()
        told = a.state[drawn]["grad_indices"].clone()
        a.draw_supports()
        a.load_state_dict(save_and_load(a.state_dict()))  # which brings what was drawn ahead
        a.draw_supports()
        drawn.grad = torch.zeros_like(drawn)
        drawn.grad.view(-1)[told] = 1.0
        plain.grad = torch.ones_like(plain)
        a.step()
        b.step()
        assert torch.equal(told, b.state[plain]["grad_indices"])
        assert torch.equal(drawn, plain)
    assert frozen not in a.state


# State


@pytest.mark.parametrize("at", [0, 1, 4, 5, 7])
@pytest.mark.parametrize("seed", [None, 5])
def test_saved_state_continues_bit_exactly(at, seed):
    shapes = [(300, 30), (8,), (4, 5, 6)]
    torch.manual_seed(1)
    unbroken = [parameter(*shape) for shape in shapes]
    a = SO(unbroken, lr=1e-2, density_ratio=0.05, T=5, seed=seed)
    run(a, unbroken, at)
    resumed = [nn.Parameter(p.detach().clone()) for p in unbroken]
    state = a.state_dict()  # whose tensors go on changing
    if seed:
        state = save_and_load(state)
        for entry in state["state"].values():
            entry["step"] = float(entry["step"])  # as some files have it
    torch.manual_seed(99)
    b = SO(resumed, lr=5.0, density_ratio=0.5, T=2)
    b.load_state_dict(state)
    run(a, unbroken, 12, seed=1)
    run(b, resumed, 12, seed=1)
    for p, q in zip(unbroken, resumed, strict=True):
        assert torch.equal(p, q)
        for name, value in a.state[p].items():
            assert torch.equal(value, b.state[q][name]), name


@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32, torch.float64])
def test_other_precision_state_loads(source, to):
    w = parameter(70, 50, dtype=source)
    a = SO([w], density_ratio=0.05, T=5)
    run(a, [w], 3)
    u = nn.Parameter(w.detach().to(to))
    b = SO([u])
    b.load_state_dict(save_and_load(a.state_dict()))
    state = b.state[u]
    assert state["indices"].dtype == state["grad_indices"].dtype == torch.int64
    assert torch.equal(state["indices"], a.state[w]["indices"])
    wide = torch.float64 if to == torch.float64 else torch.float32
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == wide
    run(b, [u], 3)


DAMAGE = {
    "an index beyond the tensor": lambda s: s["indices"].add_(1000),
    "a negative index": lambda s: s["grad_indices"].sub_(1000),
    "moments of another length": lambda s: s.update(exp_avg=s["exp_avg"][:-1]),
    "no support": lambda s: s.pop("grad_indices"),
    "no step": lambda s: s.pop("step"),
    "a number for a moment": lambda s: s.update(exp_avg=3.0),
    "a whole moment": lambda s: s.update(exp_avg_sq=torch.zeros(20, 20)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_unfit_state_is_refused(damage):
    w = parameter(20, 20)
    optimizer = SO([w], density_ratio=0.1)
    run(optimizer, [w], 3)
    before = optimizer.state[w]["exp_avg"]
    state = copy.deepcopy(optimizer.state_dict())
    DAMAGE[damage](state["state"][0])
    with pytest.raises(ValueError, match="the saved state is not that of a tensor"):
        optimizer.load_state_dict(state)
    state["param_groups"][0]["density_ratio"] = 2.0
    with pytest.raises(ValueError, match="density_ratio"):
        optimizer.load_state_dict(state)
    for other, name in ((torch.optim.Adam, "density_ratio"), (torch.optim.SGD, "eps")):
        with pytest.raises(ValueError, match=f"invalid {name}: None"):
            optimizer.load_state_dict(other([parameter(20, 20)]).state_dict())
    assert optimizer.state[w]["exp_avg"] is before


def test_foreign_state_is_left():
    params = [parameter(20, 20, dtype=torch.float32), parameter(20, dtype=torch.float32)]
    optimizer = SO(params, density_ratio=0.1, seed=1)
    foreign = dict(slow=torch.randn(3), mask=torch.rand(4) > 0.5, note=3, name="w", tags=["a"])
    for p in params:  # before the first step, as schedule_free's wrapper does
        optimizer.state[p].update(foreign)
    run(optimizer, params, 2)
    saved = save_and_load(optimizer.state_dict())
    again = SO(params, density_ratio=0.1)
    again.load_state_dict(saved)
    for p in params:
        state = again.state[p]
        assert "exp_avg" in state and (state["note"], state["name"]) == (3, "w")
        assert torch.equal(state["slow"], foreign["slow"])
        assert torch.equal(state["mask"], foreign["mask"]) and state["tags"] == ["a"]
    run(again, params, 2)
    early = SO(params, density_ratio=0.1)
    early.state[params[0]].update(foreign)
    again.load_state_dict(early.state_dict())
    run(again, params, 1)
    assert again.state[params[0]]["mask"].dtype == torch.bool


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_parameter_may_become_half_precision(dtype):
    model = nn.Linear(20, 20)
    optimizer = SO(model.parameters(), density_ratio=0.2)
    run(optimizer, list(model.parameters()), 3)
    model.to(dtype)
    run(optimizer, list(model.parameters()), 3)
    assert optimizer.state[model.bias]["exp_avg"].dtype == torch.float32


def test_indices_beyond_float32_survive_loading():
    w = nn.Parameter(torch.zeros(1, 2**24 + 10))
    a = SO([{"params": [w], "dense": False}], density_ratio=1e-7, seed=0)
    w.grad = torch.sparse_coo_tensor(size=w.shape, check_invariants=True)
    a.step()
    a.state[w]["indices"] = torch.tensor([2**24 + 1])
    b = SO([{"params": [w], "dense": False}])
    b.load_state_dict(a.state_dict())
    assert b.state[w]["indices"].tolist() == [2**24 + 1]


def test_loading_hooks_see_state():
    w = parameter(20, 30, dtype=torch.bfloat16)
    optimizer, seen = SO([w], density_ratio=0.05, seed=1), []
    run(optimizer, [w], 1)
    saved = copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(saved)
    other["state"][0]["exp_avg"] += 1.0
    optimizer.register_load_state_dict_pre_hook(lambda *_: other)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[w]["exp_avg"]))
    optimizer.load_state_dict(saved)
    assert torch.equal(seen[0], other["state"][0]["exp_avg"])
    assert optimizer.state[w]["indices"].dtype == torch.int64


# Unpickling a tensor makes torch 2.4 warn of what torch.load would do with one.
@pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("steps", [0, 2])
def test_copies_and_pickles_continue_alike(duplicate, steps):
    model = nn.ParameterList([parameter(20, 20), parameter(5)])
    pair = (model, SO(model.parameters(), density_ratio=0.1, T=3))
    run(pair[1], list(model), steps)
    other = duplicate(pair)
    run(pair[1], list(model), 5)
    run(other[1], list(other[0]), 5)
    for p, q in zip(*[list(m) for m in (pair[0], other[0])], strict=True):
        assert torch.equal(p, q)


def test_state_has_k_entries():
    w, bias = parameter(100, 100), parameter(100)
    optimizer = SO([w, bias], density_ratio=0.01)
    run(optimizer, [w, bias], 7)
    assert set(optimizer.state[w]) == SPARSE_STATE
    assert set(optimizer.state[bias]) == {"step", "exp_avg", "exp_avg_sq"}
    for name in SPARSE_STATE - {"step"}:
        assert optimizer.state[w][name].untyped_storage().nbytes() == 100 * 8
    assert int(optimizer.state[w]["step"]) == 7


def test_step_allocates_nothing_large():
    w = parameter(1000, 1000, dtype=torch.float32)
    optimizer = SO([w], density_ratio=1e-3, T=2, weight_decay=0.1)
    w.grad = torch.randn_like(w)
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
        for _ in range(4):
            optimizer.step()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < 0.1 * w.numel()  # bytes; a whole float32 copy has 4 per entry


# Living in a training loop


def test_copied_file_trains_module(tmp_path):
    shutil.copy(ROOT / "optimizers" / "SparseOptimizer.py", tmp_path)
    script = """
import torch
from SparseOptimizer import SO
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3), torch.nn.BatchNorm1d(4),
                            torch.nn.Flatten(), torch.nn.Linear(24, 3))
inputs, targets = torch.randn(32, 2, 8), torch.randint(3, (32,))
optimizer = SO(model.parameters(), lr=3e-2, density_ratio=5e-2, T=10)
losses = []
for _ in range(60):
    losses.append(torch.nn.functional.cross_entropy(model(inputs), targets))
    optimizer.zero_grad()
    losses[-1].backward()
    optimizer.step()
assert losses[-1] < 0.5 * losses[0]
"""
    command = [sys.executable, "-W", "error", "-W", "ignore:SO keeps", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_step_returns_closure_loss():
    w = parameter(4, 4)
    optimizer = SO([w], density_ratio=0.5)

    def closure():
        loss = w.square().sum()
        loss.backward()
        return loss

    expected = w.detach().square().sum()
    assert torch.equal(optimizer.step(closure), expected)
    assert optimizer.step() is None


def test_step_hooks_and_added_groups_work():
    w, u = parameter(4, 4), parameter(6, 6)
    optimizer = SO([w], lr=1.0, density_ratio=0.5, T=2)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.add_param_group({"params": [u], "density_ratio": 1.0, "T": 7, "lr": 0.5})
    run(optimizer, [w, u], 1)
    assert calls == ["before", "after"]
    assert len(optimizer.state[u]["indices"]) == 36 and len(optimizer.state[w]["indices"]) == 8


def test_grad_scaler_gives_plain_update():
    plain, scaled = [nn.Linear(20, 10) for _ in range(2)]
    scaled.load_state_dict(plain.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    a = SO(plain.parameters(), lr=1e-2, density_ratio=0.1, seed=2)
    b = SO(scaled.parameters(), lr=1e-2, density_ratio=0.1, seed=2)
    for _ in range(5):
        x = torch.randn(8, 20)
        a.zero_grad()
        b.zero_grad()
        (plain(x).square().mean()).backward()
        for half in x.split(4):
            scaler.scale(scaled(half).square().mean() / 2).backward()
        a.step()
        scaler.step(b)
        scaler.update()
    torch.testing.assert_close(plain.weight, scaled.weight, rtol=1e-4, atol=1e-5)
    before = scaled.weight.detach().clone()
    scaled.weight.grad = torch.full_like(scaled.weight, torch.inf)
    scaler.step(b)
    assert torch.equal(before, scaled.weight)


def test_no_gradient_keeps_no_state():
    w, unused = parameter(5, 5), parameter(5, 5)
    before = unused.detach().clone()
    optimizer = SO([unused, w], density_ratio=0.2)
    run(optimizer, [w], 3)
    assert torch.equal(before, unused) and not optimizer.state.get(unused)


def test_density_and_T_may_change():
    w = parameter(20, 20)
    optimizer = SO([w], density_ratio=0.01, T=4)
    run(optimizer, [w], 5)
    optimizer.param_groups[0].update(density_ratio=0.1, T=1)
    run(optimizer, [w], 1)
    optimizer.param_groups[0].update(density_ratio=0.02)
    run(optimizer, [w], 3)
    assert len(optimizer.state[w]["indices"]) == 8


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (4, 0, 2), ()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tiny_and_empty_tensors_are_taken(shape, dtype):
    w = parameter(*shape, dtype=dtype)
    optimizer = SO([w], density_ratio=1e-9, lr=1.0)
    before = w.detach().clone()
    optimizer.draw_supports()
    run(optimizer, [w], 2)
    assert w.numel() == 0 or not torch.equal(before, w)


def test_dense_key_overrides_dimensions():
    scalar, matrix = parameter(), parameter(3, 3)
    groups = [{"params": [scalar], "dense": False}, {"params": [matrix], "dense": True}]
    optimizer = SO(groups, density_ratio=0.1)
    run(optimizer, [scalar, matrix], 2)
    assert len(optimizer.state[scalar]["indices"]) == 1
    assert optimizer.state[matrix]["exp_avg"].shape == (3, 3)


def messages_of(optimizer, params, steps=1):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(optimizer, params, steps)
    return caught


def test_few_entries_bring_one_warning():
    shapes = [(400, 400), (2, 300), (5, 100), (3, 100), (4, 100), (3, 3), (30,)]
    params = [parameter(*shape) for shape in shapes]
    optimizer = SO(params, density_ratio=0.01)
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps step; the warning points past it
    (warning,) = messages_of(optimizer, params, 7)
    message = str(warning.message)
    assert warning.category is UserWarning and warning.filename == __file__
    assert "4 of 6 sparse tensors" in message and "(2, 300), (5, 100), (3, 100), ..." in message
    assert "density_ratio" in message and "dense=True" in message
    assert not messages_of(SO(params[:1], density_ratio=0.01), params)


@pytest.mark.parametrize("shape", [(1, 768), (1, 1, 768), (1, 768, 1, 1), (5,), (), (1, 1)])
def test_one_larger_dimension_is_dense(shape):
    p, matrix = parameter(*shape), parameter(40, 40)
    optimizer = SO([p, matrix], density_ratio=0.5)
    run(optimizer, [p, matrix], 1)
    assert "indices" not in optimizer.state[p] and "indices" in optimizer.state[matrix]


def test_a_default_device_changes_nothing():
    def train(device):
        torch.manual_seed(0)
        params = [parameter(30, 20), parameter(20)]
        with torch.device(device):
            optimizer = SO(params, density_ratio=0.05, T=2, seed=1)
            for p in params:
                p.grad = torch.ones_like(p)
            for _ in range(3):
                optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        return params

    assert all(map(torch.equal, train("meta"), train("cpu")))


def test_deterministic_algorithms_take_every_layout():
    w = nn.Parameter(torch.randn(8, 6, 3, 3).to(memory_format=torch.channels_last))
    half = nn.Parameter(torch.randn(20, 30).half().t())
    optimizer = SO([w, half], density_ratio=0.1, seed=1)
    before = w.detach().clone(), half.detach().clone()
    torch.use_deterministic_algorithms(True)
    try:
        run(optimizer, [w, half], 3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not torch.equal(before[0], w) and not torch.equal(before[1], half)


def test_file_parses_on_python39():
    source = (ROOT / "optimizers/SparseOptimizer.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 9))
    assert "from __future__ import annotations" in source and "strict=" not in source


# Refusals


@pytest.mark.parametrize("name, value", [
    ("lr", -1e-3), ("lr", float("nan")), ("eps", -1e-8), ("betas", (1.0, 0.999)),
    ("betas", (0.9, -0.1)), ("betas", (0.9,)), ("weight_decay", -1.0), ("density_ratio", 0.0),
    ("density_ratio", 1.01), ("T", 0), ("T", 2.5), ("T", True), ("bias_correction", "row"),
])  # fmt: skip
def test_settings_out_of_range_refused(name, value):
    wrong = {name: value}
    with pytest.raises(ValueError, match=name):
        SO([parameter(3, 3)], **wrong)
    with pytest.raises(ValueError, match=name):
        SO([{"params": [parameter(3, 3)], **wrong}])
    optimizer = SO([parameter(3, 3)])
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": [parameter(3, 3)], **wrong})
    assert len(optimizer.param_groups) == 1


def test_keys_of_other_programs_are_left():
    keys = dict(initial_lr=0.1, lr_scale=0.5, name="head", swa_lr=1.0, max_lr=1.0, lr_mult=2)
    group = SO([{"params": [parameter(3, 3)], **keys}]).param_groups[0]
    assert keys.items() <= group.items()


def test_frozen_complex_parameters_are_left():
    frozen = nn.Parameter(torch.ones(3, 3, dtype=torch.complex64), requires_grad=False)
    w = parameter(5, 5)
    optimizer = SO([frozen, w], density_ratio=0.5)
    run(optimizer, [w], 2)
    assert frozen not in optimizer.state
    frozen.requires_grad_().grad = torch.ones_like(frozen)
    with pytest.raises(ValueError, match="complex"):
        optimizer.step()


def test_empty_and_complex_are_refused():
    with pytest.raises(ValueError, match="empty parameter list"):
        SO([])
    with pytest.raises(ValueError, match="complex"):
        SO([nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))])


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_update_equals_cpu(dtype):
    ours = [parameter(64, 96, dtype=dtype), parameter(64, dtype=dtype), parameter(20, 30)]
    theirs = [nn.Parameter(p.detach().cuda()) for p in ours]
    a = SO(ours, lr=1e-2, density_ratio=0.05, T=2, seed=1)
    b = SO(theirs, lr=1e-2, density_ratio=0.05, T=2, seed=1)
    for step in range(6):
        for p, q in list(zip(ours, theirs, strict=True))[: 1 + step]:  # thawed one after another
            p.grad = torch.randn_like(p)
            q.grad = p.grad.cuda()
        a.step()
        with forbid_gpu_sync():
            b.step()
        seen = b.state[theirs[0]]["grad_indices"].cpu()
        assert torch.equal(seen, a.state[ours[0]]["grad_indices"])
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q.cpu())
