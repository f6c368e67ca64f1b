"""Sampled gradients against plain ones: values, weights after training, memory, and giving back."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from helpers import forbid_gpu_sync, needs_sparse_clipping, save_and_load
from torch import nn
from torch.utils.checkpoint import checkpoint

from optimizers import SampledGradients
from optimizers.SampledGradients import sample_gradients
from optimizers.SparseOptimizer import SO, draw_support

CLOSE = dict(rtol=1e-10, atol=1e-12)
# An eps above rounding: Adam would make a step of a gradient that is zero but for rounding.
SETTINGS = dict(lr=1e-2, eps=1e-4, weight_decay=0.01, density_ratio=0.05, T=3, seed=5)
NOT_LINEAR = "not used by F.linear"


@pytest.fixture(autouse=True)
def products_entry_by_entry(monkeypatch):
    """Matrices here are so small that all would be computed whole."""
    monkeypatch.setattr(SampledGradients, "DENSE_MATMUL_DENSITY", 2)


def draw(k):
    """A support of a matrix of shape (5, 7)."""
    return draw_support(35, k, torch.Generator().manual_seed(0))


def leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype).requires_grad_()


def sampled_linear(x, weight, bias, support):
    plan = SampledGradients._make_plans({weight: support})[weight]
    return SampledGradients._SampledLinear.apply(x, weight, bias, plan, slice(None))


class Packed(nn.Linear):
    """A layer whose rows are used in two parts, as those of queries, keys and values may be."""

    def forward(self, x):
        parts = slice(11), slice(11, None)
        return torch.cat([F.linear(x, self.weight[rows], self.bias[rows]) for rows in parts], -1)


def make_mlp():
    return nn.Sequential(Packed(20, 30), nn.Tanh(), nn.LayerNorm(30), nn.Linear(30, 10)).double()


def mlp_loss(model, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 4, 20, generator=generator, dtype=torch.float64)
    with torch.no_grad():  # an evaluation in between
        model(x)
    return model(x).square().mean()


def mlp_backward(model, step):
    mlp_loss(model, step).backward()


def twice(**settings):
    """The same model twice, with an optimizer each; the second one gets sampled gradients."""
    plain = make_mlp()
    ours = copy.deepcopy(plain)
    a, b = (SO(model.parameters(), **(SETTINGS | settings)) for model in (plain, ours))
    return plain, ours, a, b, sample_gradients(ours, b)


def train(pairs, steps, backward=mlp_backward):
    """Train each (model, optimizer), a step for each number."""
    for step in steps:
        for model, optimizer in pairs:
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            backward(model, step)
            optimizer.step()


def assert_equal_weights(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **CLOSE, msg=name)


# One product


@pytest.mark.parametrize("shape", [(0, 7), (7,), (9, 7), (2, 0, 7), (2, 3, 4, 7)])
@pytest.mark.parametrize("k", [1, 4, 20, 35])
@pytest.mark.parametrize("chunk, product_from", [(1, 2), (2**18, 2), (1, 0)])
def test_product_equals_plain_gradient(shape, k, chunk, product_from, monkeypatch):
    monkeypatch.setitem(SampledGradients.CHUNK, "cpu", chunk)
    monkeypatch.setattr(SampledGradients, "DENSE_MATMUL_DENSITY", product_from)
    x, weight, bias, support = leaf(*shape), leaf(5, 7), leaf(5), draw(k)
    expected = F.linear(x, weight, bias)
    dy = torch.randn_like(expected)
    dx, dw, db = torch.autograd.grad(expected, (x, weight, bias), dy)
    out = sampled_linear(x, weight, bias, support)
    out.backward(dy)
    assert torch.equal(out, expected)
    assert weight.grad.is_sparse and weight.grad.shape == (5, 7) and weight.grad._nnz() == k
    torch.testing.assert_close(x.grad, dx, **CLOSE)
    torch.testing.assert_close(bias.grad, db, **CLOSE)
    wanted = torch.zeros_like(dw).put_(support, dw.take(support))
    torch.testing.assert_close(weight.grad.to_dense(), wanted, **CLOSE)


def test_strides_do_not_matter():
    base, matrix, support = torch.randn(7, 3, 8, dtype=torch.float64), leaf(7, 5), draw(6)
    weight = matrix.detach().t().requires_grad_()
    for x in (base.permute(2, 1, 0), base[:, 0, ::2].t(), base[:, 0, :1].t().expand(4, 7)):
        dy = torch.randn(5, *x.shape[:-1], dtype=torch.float64).movedim(0, -1)
        assert not (x.is_contiguous() or weight.is_contiguous() or dy.is_contiguous())
        (expected,) = torch.autograd.grad(F.linear(x, matrix.t()), matrix, dy)
        weight.grad = None
        sampled_linear(x, weight, None, support).backward(dy)
        values = weight.grad.to_dense().take(support)
        torch.testing.assert_close(values, expected.t().take(support), **CLOSE)


def test_frozen_parts_get_nothing():
    x, weight, bias = leaf(6, 7), leaf(5, 7), leaf(5)
    sampled_linear(x.detach(), weight, bias.detach(), draw(3)).sum().backward()
    assert weight.grad._nnz() == 3 and x.grad is None and bias.grad is None
    sampled_linear(x, weight.detach(), bias, draw(3)).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(dim=0).expand(6, 7), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("product_from, close", [(2, 1e-4), (0, 1e-2)])  # by entry; whole
def test_autocast_multiplies_low_and_sums_high(dtype, product_from, close, monkeypatch):
    monkeypatch.setattr(SampledGradients, "DENSE_MATMUL_DENSITY", product_from)
    x, weight, bias = (leaf(*shape, dtype=torch.float32) for shape in [(4, 900, 7), (5, 7), (5,)])
    support = draw(9)
    with torch.autocast("cpu", dtype):
        expected = F.linear(x, weight, bias)
        out = sampled_linear(x, weight, bias, support)
    assert out.dtype == dtype and torch.equal(out, expected)
    dy = torch.randn_like(out)
    out.backward(dy)
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32
    exact = dy.double().flatten(0, 1).t() @ x.detach().to(dtype).double().flatten(0, 1)
    values = weight.grad.to_dense().double().take(support)
    torch.testing.assert_close(values, exact.take(support), rtol=close, atol=close)
    for ours, plain in zip((x, bias), torch.autograd.grad(expected, (x, bias), dy), strict=True):
        torch.testing.assert_close(ours.grad, plain, rtol=1e-2, atol=1e-2)


def test_half_precision_gradients_keep_dtype():
    x, weight = leaf(600, 7, dtype=torch.bfloat16), leaf(5, 7, dtype=torch.bfloat16)
    out, support = sampled_linear(x, weight, None, draw(9)), draw(9)
    dy = torch.randn_like(out)
    out.backward(dy)
    exact = (dy.double().t() @ x.detach().double()).bfloat16()
    assert torch.equal(weight.grad.to_dense().take(support), exact.take(support))


# Training


@pytest.mark.parametrize("T", [1, 3])
def test_training_equals_plain_computation(T):
    plain, ours, a, b, handle = twice(T=T)
    assert [id(p) for p in handle.params] == [id(ours[0].weight), id(ours[3].weight)]

    def micro_batches(model, step):
        for part in range(1 + step % 3):
            mlp_backward(model, 10 * step + part)

    for step in range(8):
        train([(plain, a), (ours, b)], [step], micro_batches)
        for p, q in ((ours[i].weight, plain[i].weight) for i in (0, 3)):
            support = b.state[p]["grad_indices"]
            assert p.grad.is_coalesced() and p.grad._nnz() == len(support)
            values = p.grad.to_dense().take(support)
            torch.testing.assert_close(values, q.grad.take(support), **CLOSE)
        assert_equal_weights(plain, ours)


def test_leftover_gradients_are_right():
    """Those of another loss, at a support that is drawn anew, as in the loop of a GAN."""
    plain, ours, a, b, _ = twice(T=2)
    for step in range(6):
        train([(plain, a), (ours, b)], [step])
        for model in (plain, ours):
            mlp_backward(model, 100 + step)
    assert_equal_weights(plain, ours)


@needs_sparse_clipping
def test_clipped_norm_is_of_support():
    plain, ours, a, b, _ = twice()
    supports = {p: b.state[q] for p, q in zip(plain.parameters(), ours.parameters(), strict=True)}
    norms = []

    def clipped(model, step):
        mlp_backward(model, 2 * step)
        mlp_backward(model, 2 * step + 1)
        for p in model.parameters() if model is plain else ():
            if p.dim() == 2:  # what the plain computation would have to clip
                support = supports[p]["grad_indices"]
                p.grad = torch.zeros_like(p).put_(support, p.grad.take(support))
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01))

    for step in range(4):
        train([(ours, b), (plain, a)], [step], clipped)
        torch.testing.assert_close(*norms[-2:], **CLOSE)
        assert norms[-1] > 0.01
    assert_equal_weights(plain, ours)


def test_grad_scaler_unscales_and_skips():
    plain, ours, a, b, _ = twice()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        overflow = step == 3
        train([(plain, a)], [] if overflow else [step])
        b.zero_grad()
        scaler.scale(mlp_loss(ours, step) * (torch.inf if overflow else 1)).backward()
        scaler.step(b)
        scaler.update()
    assert scaler.get_scale() == 512
    assert_equal_weights(plain, ours)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")
def test_recomputed_activations_and_closures_work(reentrant):
    plain, ours, a, b, _ = twice()
    x = torch.ones(3, 20, dtype=torch.float64, requires_grad=True)

    def closure():
        b.zero_grad()
        loss = checkpoint(ours, x, use_reentrant=reentrant).square().mean()
        loss.backward()
        assert ours[0].weight.grad.is_sparse
        return loss

    for step in range(4):
        train([(plain, a)], [step], lambda model, _: model(x).square().mean().backward())
        b.step(closure)
    assert_equal_weights(plain, ours)


def test_thawed_parameter_is_drawn():
    plain, ours, a, b, _ = twice(T=1)

    def thaw_between(model, step):
        model[0].requires_grad_(step < 2)
        mlp_backward(model, step)
        model[0].requires_grad_(True)
        mlp_backward(model, step + 10)

    train([(plain, a), (ours, b)], range(6), thaw_between)
    assert_equal_weights(plain, ours)


@pytest.mark.parametrize("steps", [2, 3])  # within a window of T, and at its end
def test_loaded_state_brings_its_supports(steps):
    plain, ours, a, b, _ = twice()
    train([(plain, a)], range(steps))
    mlp_backward(ours, 0)  # draws supports that the loaded state replaces
    ours.load_state_dict(plain.state_dict())
    b.load_state_dict(a.state_dict())
    train([(plain, a), (ours, b)], range(steps, 6))
    assert_equal_weights(plain, ours)


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="torch 2.4 compiles no slice of a subclass")
def test_compiled_code_computes_plain_gradients():
    plain, ours, a, b, _ = twice()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    train([(plain, a), (compiled, b)], range(3))
    assert not ours[0].weight.grad.is_sparse
    assert_equal_weights(plain, ours)


# Memory


def saved_bytes(model, x):
    """Bytes kept for the backward pass."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(storages.values())


def test_forward_saves_columns_only():
    model, x = nn.Linear(256, 256, bias=False), torch.randn(1000, 256)
    whole = 4 * 1000 * 256
    assert saved_bytes(model, x) == whole
    # k = 65 and 655, of fewer columns, and 6553, of all
    for density, limit in {1e-3: 4 * 1000 * 65, 1e-2: whole - 1, 0.1: whole}.items():
        sample_gradients(model, SO(model.parameters(), density_ratio=density, seed=0))
        assert saved_bytes(model, x) <= limit


def test_backward_allocates_nothing_large():
    model, x = nn.Linear(1000, 2000), torch.randn(3000, 1000)
    optimizer = SO(model.parameters(), density_ratio=5e-4, seed=0)
    sample_gradients(model, optimizer)
    for _ in range(2):
        out = model(x)
        dy = torch.randn_like(out)
        optimizer.zero_grad()
        activity = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
            out.backward(dy)
            optimizer.step()
        largest = max(event.self_cpu_memory_usage for event in profile.events())
        assert 0 < largest < 1.1 * 4 * SampledGradients.CHUNK["cpu"] < model.weight.numel()


# What is sampled, and giving back


def test_remove_restores_plain_gradients():
    plain, ours, a, b, handle = twice()
    train([(plain, a), (ours, b)], [0])
    assert ours[0].weight.grad.is_sparse
    other = sample_gradients(ours, b)
    assert handle.params == []  # the second one has removed the first
    other.remove()
    train([(plain, a), (ours, b)], [1])
    assert not ours[0].weight.grad.is_sparse
    assert {type(p) for p in ours.parameters()} == {nn.Parameter}
    assert not b._optimizer_step_pre_hooks and not b._optimizer_step_post_hooks
    assert_equal_weights(plain, ours)


def test_evaluation_copies_and_files_are_plain():
    plain, ours, _, _, _ = twice()
    x = torch.randn(3, 20, dtype=torch.float64)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(ours(x), plain(x))
    other = copy.deepcopy(ours)
    other(x).sum().backward()
    assert not other[0].weight.grad.is_sparse
    sample_gradients(other, SO(other.parameters()))
    other.zero_grad()
    other(x).sum().backward()
    assert other[0].weight.grad.is_sparse
    for content in (ours.state_dict(), ours[0].weight):
        save_and_load(content)
    assert type(ours.state_dict()["0.weight"]) is torch.Tensor


def test_nothing_is_kept_alive():
    _, ours, _, b, handle = twice()
    handle = weakref.ref(handle)
    train([(ours, b)], [0])
    matrix = weakref.ref(ours[0].weight)
    gc.collect()
    assert handle() is not None  # nobody needs to keep the handle
    del ours, b
    gc.collect()
    assert handle() is None and matrix() is None


def test_unfit_models_are_refused():
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="Adam"):
        sample_gradients(model, torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match="no sparse matrix"):
        sample_gradients(model, SO(nn.Linear(4, 4).parameters()))


@pytest.mark.parametrize(
    "layer, dense, reason",
    [
        (nn.Linear(8, 1), [], None),  # dense in SO
        (nn.Conv1d(2, 2, 1), ["0.weight"], "3 dimensions"),
        (nn.MultiheadAttention(8, 2), ["0.in_proj_weight", "0.out_proj.weight"], NOT_LINEAR),
        (nn.LSTM(8, 8), ["0.weight_ih_l0", "0.weight_hh_l0"], NOT_LINEAR),
        (nn.GRUCell(8, 8), ["0.weight_ih", "0.weight_hh"], NOT_LINEAR),
        (nn.EmbeddingBag(9, 8), ["0.weight"], NOT_LINEAR),
    ],
)
def test_other_modules_stay_whole(layer, dense, reason):
    model = nn.ModuleList([layer, nn.Linear(8, 8), nn.Linear(8, 8)])
    groups = [{"params": model[:2].parameters()}, {"params": model[2].parameters(), "dense": True}]
    handle = sample_gradients(model, SO(groups, density_ratio=0.1))
    assert [id(p) for p in handle.params] == [id(model[1].weight)]
    assert handle.dense == dict.fromkeys(dense, reason)


@pytest.mark.parametrize("pruned", [False, True])
def test_handle_reports_what_was_sampled(pruned):
    model = nn.Linear(8, 8)
    model.W = nn.Parameter(torch.randn(8, 8))
    if pruned:  # the parameter is another one, and F.linear is given a product with its mask
        nn.utils.prune.l1_unstructured(model, "weight", 0.5)
    handle = sample_gradients(model, SO(model.parameters(), density_ratio=0.1))
    head = "sampled gradients in {} matrices, whole ones in {} others"
    assert repr(handle) == "expected: " + head.format(2, 0)
    (model(torch.randn(5, 8)) @ model.W).sum().backward()  # as in GPT-2's Conv1D
    weight = model.weight_orig if pruned else model.weight
    assert weight.grad.is_sparse is not pruned and not model.W.grad.is_sparse
    lines = repr(handle).splitlines()
    assert lines[0] == head.format(1 - pruned, 1 + pruned)
    assert "    whole: W (not used by F.linear only, or compiled)" in lines


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gpu_gradients_equal_cpu(precision):
    ours = make_mlp().float()
    theirs = copy.deepcopy(ours).cuda()
    pairs = [(model, SO(model.parameters(), **SETTINGS)) for model in (ours, theirs)]
    for model, optimizer in pairs:
        sample_gradients(model, optimizer)
    x = torch.randn(6, 4, 20)

    def micro_batches(model, _):
        device = model[0].weight.device
        for _ in range(2):
            with torch.autocast(device.type, precision, precision != torch.float32):
                out = model(x.to(device, non_blocking=True))
            out.float().square().mean().backward()

    for step in range(5):
        with forbid_gpu_sync("error" if step else "default"):  # the first one warms up
            train(pairs, [step], micro_batches)
        assert theirs[0].weight.grad.is_sparse
    tolerance = 1e-4 if precision == torch.float32 else 5e-2
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=tolerance, atol=tolerance)
