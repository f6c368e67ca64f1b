"""Sampled gradients against plain ones: values, weights after training, memory, and giving back."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from clip_helpers import TINY_VIT, random_state_dict
from helpers import forbid_gpu_sync, needs_sparse_clipping, save_and_load
from torch import nn
from torch.utils.checkpoint import checkpoint

from clip import build_model
from optimizers import SampledGradients
from optimizers.SampledGradients import sample_gradients, sampled_linear
from optimizers.SparseOptimizer import SO, draw_support

CLOSE = dict(rtol=1e-10, atol=1e-12)
# An eps above rounding: Adam would make a step of a gradient that is zero but for rounding.
SETTINGS = dict(lr=1e-2, eps=1e-4, weight_decay=0.01, density_ratio=0.05, T=3, seed=5)


def support(shape, k, seed=0):
    return draw_support(shape[0] * shape[1], k, torch.Generator().manual_seed(seed))


def leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype).requires_grad_()


def make_mlp():
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.LayerNorm(30), nn.Linear(30, 10)).double()


def make_clip():
    """A tiny CLIP of which the matrices that the main job adapts require gradients."""
    model = build_model(random_state_dict(TINY_VIT)).double().requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad_("resblocks" in name and p.dim() == 2)
    return model


def clip_loss(model, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, 512, (4, 9), generator=generator)
    tokens[:, -1] = 513
    return F.cross_entropy(model(images, tokens)[0], torch.arange(4))


def mlp_loss(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return model(torch.randn(6, 4, 20, generator=generator, dtype=torch.float64)).square().mean()


@pytest.fixture(autouse=True)
def products_entry_by_entry(monkeypatch):
    """Matrices here are so small that all would be computed whole."""
    monkeypatch.setattr(SampledGradients, "DENSE_MATMUL_DENSITY", 2)


CASES = pytest.mark.parametrize("make, loss", [(make_mlp, mlp_loss), (make_clip, clip_loss)])


def twice(make, **settings):
    """The same model twice, with an optimizer each."""
    plain = make()
    models = plain, copy.deepcopy(plain)
    trained = [[p for p in model.parameters() if p.requires_grad] for model in models]
    return *models, *(SO(params, **(SETTINGS | settings)) for params in trained)


def train(pairs, steps, loss=mlp_loss):
    """Train each (model, optimizer), a step for each number."""
    for step in steps:
        for model, optimizer in pairs:
            optimizer.zero_grad()
            loss(model, step).backward()
            optimizer.step()


def assert_equal_weights(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **CLOSE, msg=name)


# One product


@pytest.mark.parametrize("shape", [(0, 7), (7,), (9, 7), (2, 3, 7), (2, 0, 7), (2, 3, 4, 7)])
@pytest.mark.parametrize("k", [1, 4, 20, 35])
@pytest.mark.parametrize("chunk, product_from", [(1, 2), (2**18, 2), (1, 0)])
def test_sampled_linear_equals_plain_gradient(shape, k, chunk, product_from, monkeypatch):
    monkeypatch.setitem(SampledGradients.CHUNK, "cpu", chunk)
    monkeypatch.setattr(SampledGradients, "DENSE_MATMUL_DENSITY", product_from)
    x, weight, bias = leaf(*shape), leaf(5, 7), leaf(5)
    at = support((5, 7), k)
    out = F.linear(x, weight, bias)
    dy = torch.randn_like(out)
    dx, dw, db = torch.autograd.grad(out, (x, weight, bias), dy)
    ours = sampled_linear(x, weight, bias, at)
    ours.backward(dy)
    assert torch.equal(ours, out) and weight.grad.is_sparse and weight.grad.shape == weight.shape
    assert weight.grad._nnz() == k
    torch.testing.assert_close(x.grad, dx, **CLOSE)
    torch.testing.assert_close(bias.grad, db, **CLOSE)
    expected = torch.zeros_like(dw).flatten().index_copy(0, at, dw.take(at)).view_as(dw)
    torch.testing.assert_close(weight.grad.to_dense(), expected, **CLOSE)


def test_strides_do_not_matter():
    base, matrix = torch.randn(7, 3, 8, dtype=torch.float64), leaf(7, 5)
    at = support((5, 7), 6)
    weight = matrix.detach().t().requires_grad_()
    for x in (base.permute(2, 1, 0), base[:, 0, ::2].t(), base[:, 0, :1].t().expand(4, 7)):
        dy = torch.randn(5, *x.shape[:-1], dtype=torch.float64).movedim(0, -1)
        assert not (x.is_contiguous() or weight.is_contiguous() or dy.is_contiguous())
        (expected,) = torch.autograd.grad(F.linear(x, matrix.t()), matrix, dy)
        weight.grad = None
        sampled_linear(x, weight, None, at).backward(dy)
        torch.testing.assert_close(weight.grad.to_dense().take(at), expected.t().take(at), **CLOSE)


def test_support_serves_other_widths():
    at = torch.tensor([3, 5, 11])
    for shape in [(4, 3), (3, 4), (2, 6)]:
        x, weight = leaf(5, shape[1]), leaf(*shape)
        sampled_linear(x, weight, None, at).sum().backward()
        expected = x.detach().sum(dim=0).expand(shape).take(at)
        torch.testing.assert_close(weight.grad.to_dense().take(at), expected, **CLOSE)


def test_frozen_parts_cost_and_give_nothing():
    x, weight, bias = leaf(6, 7), leaf(5, 7), leaf(5)
    at = support((5, 7), 3)
    sampled_linear(x.detach(), weight, bias.detach(), at).sum().backward()
    assert weight.grad._nnz() == 3 and x.grad is None and bias.grad is None
    sampled_linear(x, weight.detach(), bias, at).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(dim=0).expand(6, 7), **CLOSE)
    with torch.no_grad():
        assert not sampled_linear(x, weight, bias, at).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("product_from, close", [(2, 1e-4), (0, 1e-2)])  # by entry; whole
def test_autocast_multiplies_low_and_sums_high(dtype, product_from, close, monkeypatch):
    monkeypatch.setattr(SampledGradients, "DENSE_MATMUL_DENSITY", product_from)
    x, weight, bias = (leaf(*shape, dtype=torch.float32) for shape in [(4, 900, 7), (5, 7), (5,)])
    at = support((5, 7), 9)
    with torch.autocast("cpu", dtype):
        expected = F.linear(x, weight, bias)
        out = sampled_linear(x, weight, bias, at)
    assert out.dtype == dtype and torch.equal(out, expected)
    dy = torch.randn_like(out)
    out.backward(dy)
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32
    exact = dy.double().flatten(0, 1).t() @ x.detach().to(dtype).double().flatten(0, 1)
    got = weight.grad.to_dense().double().take(at)
    torch.testing.assert_close(got, exact.take(at), rtol=close, atol=close)
    for ours, plain in zip((x, bias), torch.autograd.grad(expected, (x, bias), dy), strict=True):
        torch.testing.assert_close(ours.grad, plain, rtol=1e-2, atol=1e-2)


def test_half_precision_gradients_keep_dtype():
    x, weight = leaf(600, 7, dtype=torch.bfloat16), leaf(5, 7, dtype=torch.bfloat16)
    at = support((5, 7), 9)
    out = sampled_linear(x, weight, None, at)
    dy = torch.randn_like(out)
    out.backward(dy)
    exact = (dy.double().t() @ x.detach().double()).bfloat16()
    assert torch.equal(weight.grad.to_dense().take(at), exact.take(at))


def test_sampled_linear_refuses_other_shapes():
    with pytest.raises(ValueError, match="two dimensions"):
        sampled_linear(leaf(3, 4), leaf(4), None, torch.tensor([0]))
    with pytest.raises(ValueError, match="indices"):
        sampled_linear(leaf(3, 4), leaf(5, 4), None, torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="indices"):
        sampled_linear(leaf(3, 4), leaf(5, 4), None, torch.tensor([0], dtype=torch.int32))


# Training


@CASES
@pytest.mark.parametrize("T", [1, 3])
def test_training_equals_plain_computation(make, loss, T):
    plain, ours, a, b = twice(make, T=T)
    handle = sample_gradients(ours, b)
    for step in range(8):
        for model, optimizer in ((plain, a), (ours, b)):
            optimizer.zero_grad()
            loss(model, step).backward()
        for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
            if p.grad is not None and p.dim() == 2:
                at = b.state[q]["grad_indices"]
                assert q.grad.is_coalesced() and q.grad._nnz() == len(at)
                values = p.grad.take(at)
                torch.testing.assert_close(q.grad.to_dense().take(at), values, **CLOSE)
        a.step()
        b.step()
        assert_equal_weights(plain, ours)
    wanted = [p for p in ours.parameters() if p.requires_grad and p.dim() == 2]
    assert len(handle.params) == len(wanted) and all(map(torch.equal, handle.params, wanted))


@CASES
def test_micro_batches_add_up(make, loss):
    plain, ours, a, b = twice(make)
    handle = sample_gradients(ours, b)
    for step in range(5):
        for model, optimizer in ((plain, a), (ours, b)):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            (loss(model, 10 * step) + 2 * loss(model, 10 * step + 1)).backward()
            with torch.no_grad():
                loss(model, 0)  # an evaluation in between
            loss(model, 10 * step + 2).backward()
            for p in handle.params if model is ours else ():
                assert p.grad.is_coalesced() and p.grad._nnz() == len(b.state[p]["grad_indices"])
            optimizer.step()
    assert_equal_weights(plain, ours)


@needs_sparse_clipping
def test_clipped_norm_is_of_support():
    plain, ours, a, b = twice(make_mlp)
    sample_gradients(ours, b)
    for step in range(4):
        for model, optimizer in ((plain, a), (ours, b)):
            optimizer.zero_grad()
            mlp_loss(model, 2 * step).backward()
            mlp_loss(model, 2 * step + 1).backward()
        for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
            if q.grad.is_sparse:  # what the plain computation would have to clip
                wanted = torch.zeros_like(p).flatten()
                wanted[b.state[q]["grad_indices"]] = 1
                p.grad *= wanted.view_as(p)
        norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.01) for m in (plain, ours)]
        torch.testing.assert_close(*norms, **CLOSE)
        assert norms[0] > 0.01
        a.step()
        b.step()
    assert_equal_weights(plain, ours)


def test_grad_scaler_unscales_and_skips():
    plain, ours, a, b = twice(make_mlp)
    sample_gradients(ours, b)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        overflow = step == 3
        train([(plain, a)], [] if overflow else [step])
        b.zero_grad()
        loss = mlp_loss(ours, step) * (torch.inf if overflow else 1)
        scaler.scale(loss).backward()
        assert ours[0].weight.grad.is_sparse
        scaler.step(b)
        scaler.update()
    assert scaler.get_scale() == 512
    assert_equal_weights(plain, ours)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")
def test_recomputed_activations_and_closures_work(reentrant):
    plain, ours, a, b = twice(make_mlp)
    sample_gradients(ours, b)

    def closure():
        b.zero_grad()
        x = torch.ones(3, 20, dtype=torch.float64, requires_grad=True)
        loss = checkpoint(ours, x, use_reentrant=reentrant).square().mean()
        loss.backward()
        assert ours[0].weight.grad.is_sparse
        return loss

    for _ in range(4):
        a.zero_grad()
        plain(torch.ones(3, 20, dtype=torch.float64)).square().mean().backward()
        a.step()
        b.step(closure)
    assert_equal_weights(plain, ours)


def test_thawed_parameter_is_drawn():
    plain, ours, a, b = twice(make_mlp, T=1)
    sample_gradients(ours, b)
    for step in range(6):
        for model, optimizer in ((plain, a), (ours, b)):
            optimizer.zero_grad()
            model[0].requires_grad_(step < 2)
            mlp_loss(model, step).backward()
            model[0].requires_grad_(True)
            mlp_loss(model, step + 10).backward()
            optimizer.step()
    assert_equal_weights(plain, ours)


@pytest.mark.parametrize("steps", [2, 3])  # within a window of T, and at its end
def test_loading_a_state_brings_its_supports(steps):
    plain, ours, a, b = twice(make_mlp)
    sample_gradients(ours, b)
    train([(plain, a)], range(steps))
    mlp_loss(ours, 0).backward()  # draws supports that the loaded state replaces
    ours.load_state_dict(plain.state_dict())
    b.load_state_dict(a.state_dict())
    train([(plain, a), (ours, b)], range(steps, 6))
    assert_equal_weights(plain, ours)


def test_multihead_attention_keeps_dense_gradients():
    plain, ours, a, b = twice(
        lambda: nn.TransformerEncoderLayer(20, 2, 32, dropout=0.0, batch_first=True).double()
    )
    handle = sample_gradients(ours, b)
    assert [id(p) for p in handle.params] == [id(ours.linear1.weight), id(ours.linear2.weight)]
    attention = "used by torch's own MultiheadAttention"
    assert handle.dense == dict.fromkeys(
        ["self_attn.in_proj_weight", "self_attn.out_proj.weight"], attention
    )
    train([(plain, a), (ours, b)], range(4))
    assert ours.linear1.weight.grad.is_sparse and not ours.self_attn.in_proj_weight.grad.is_sparse
    assert_equal_weights(plain, ours)


# Memory


def saved(model, x):
    """Bytes kept for the backward pass, and whether x is among it."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(storages.values()), x.untyped_storage().data_ptr() in storages


def test_forward_saves_columns_only():
    model = nn.Linear(256, 256, bias=False)
    x = torch.randn(1000, 256)
    optimizer = SO(model.parameters(), density_ratio=1e-3)
    whole = 4 * 1000 * 256
    assert saved(model, x) == (whole, True)
    with sample_gradients(model, optimizer):
        kept, whole_input = saved(model, x)
        assert kept <= 4 * 1000 * 65 and not whole_input  # k = 65, no column twice
    for density, all_columns in ((1e-2, False), (0.1, True)):  # k = 655 and 6553
        with sample_gradients(model, SO(model.parameters(), density_ratio=density, seed=0)):
            kept, whole_input = saved(model, x)
            assert (kept == whole and whole_input) if all_columns else kept < whole


def test_backward_allocates_nothing_large():
    model = nn.Linear(1000, 2000)
    optimizer = SO(model.parameters(), density_ratio=5e-4, seed=0)
    sample_gradients(model, optimizer)
    x = torch.randn(3000, 1000)
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


# Giving back


def test_remove_restores_plain_gradients():
    plain, ours, a, b = twice(make_clip)
    before = [(type(p), id(p)) for p in ours.parameters()]
    hooks = len(b._optimizer_step_post_hooks), len(b._optimizer_load_state_dict_post_hooks)
    with sample_gradients(ours, b) as handle:
        assert [id(p) for p in ours.parameters()] == [at for _, at in before]
        clip_loss(ours, 0).backward()
        assert ours.transformer.resblocks[0].attn.in_proj_weight.grad.is_sparse
        b.step()
    handle.remove()
    sample_gradients(ours, b).remove()
    clip_loss(plain, 0).backward()
    a.step()
    train([(plain, a), (ours, b)], [1], clip_loss)
    assert not ours.transformer.resblocks[0].attn.in_proj_weight.grad.is_sparse
    assert [(type(p), id(p)) for p in ours.parameters()] == before
    assert (
        len(b._optimizer_step_post_hooks),
        len(b._optimizer_load_state_dict_post_hooks),
    ) == hooks
    assert_equal_weights(plain, ours)


def test_evaluation_copies_and_files_are_plain():
    _, ours, _, b = twice(make_mlp)
    x = torch.randn(3, 20, dtype=torch.float64)
    expected = ours(x).detach()
    sample_gradients(ours, b)
    with torch.no_grad():
        assert torch.equal(ours(x), expected)
    with torch.inference_mode():
        assert torch.equal(ours(x), expected)
    other = copy.deepcopy(ours)
    other(x).sum().backward()
    assert not other[0].weight.grad.is_sparse
    optimizer = SO(other.parameters())
    with sample_gradients(other, optimizer):
        optimizer.zero_grad()
        other(x).sum().backward()
        assert other[0].weight.grad.is_sparse
    for content in (ours.state_dict(), ours[0].weight):
        save_and_load(content)
    assert type(ours.state_dict()["0.weight"]) is torch.Tensor


def test_nothing_is_kept_alive():
    _, ours, _, b = twice(make_mlp)
    handle = weakref.ref(sample_gradients(ours, b))
    mlp_loss(ours, 0).backward()
    b.step()
    gc.collect()
    assert handle() is not None  # nobody needs to keep the handle
    matrix = weakref.ref(ours[0].weight)
    del ours, b
    gc.collect()
    assert handle() is None and matrix() is None


def test_dense_groups_are_left():
    one_row = nn.Linear(8, 1)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv1d(2, 2, 1), one_row)
    groups = [
        {"params": model[0].parameters(), "dense": True},
        {"params": [p for layer in model[1:] for p in layer.parameters()]},
    ]
    handle = sample_gradients(model, SO(groups, density_ratio=0.1))
    assert [id(p) for p in handle.params] == [id(model[1].weight)]
    assert repr(handle).splitlines() == [
        "expected: sampled gradients in 1 matrices, 6 of 64 entries; whole in 1 others",
        "    whole: 2.weight (3 dimensions)",
    ]


def test_unfit_models_are_refused():
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="Adam"):
        sample_gradients(model, torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match="no sparse matrix"):
        sample_gradients(model, SO(nn.Linear(4, 4).parameters()))
    optimizer = SO(model.parameters())
    sample_gradients(model, optimizer)
    with pytest.raises(ValueError, match="already active"):
        sample_gradients(model, optimizer)


def test_compiled_code_computes_plain_gradients():
    plain, ours, a, b = twice(make_mlp)
    sample_gradients(ours, b)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    train([(plain, a), (compiled, b)], range(3))
    assert not ours[0].weight.grad.is_sparse
    assert_equal_weights(plain, ours)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gpu_gradients_equal_cpu(precision):
    ours = make_mlp().float()
    theirs = copy.deepcopy(ours).cuda()
    pairs = [(m, SO(m.parameters(), **SETTINGS)) for m in (ours, theirs)]
    for model, optimizer in pairs:
        sample_gradients(model, optimizer)
    x = torch.randn(6, 4, 20)
    inputs = x, x.cuda()
    for step in range(5):
        with forbid_gpu_sync("error" if step else "default"):  # the first one warms up
            for (model, optimizer), batch in zip(pairs, inputs, strict=True):
                optimizer.zero_grad()
                for _ in range(2):
                    with torch.autocast(batch.device.type, precision, precision != torch.float32):
                        out = model(batch)
                    out.float().square().mean().backward()
                optimizer.step()
        assert theirs[0].weight.grad.is_sparse
    tolerance = 1e-4 if precision == torch.float32 else 5e-2
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=tolerance, atol=tolerance)


class Product(nn.Module):
    """x @ W, as in GPT-2's Conv1D, beside a Linear."""

    def __init__(self):
        super().__init__()
        self.W, self.linear = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x) @ self.W


@pytest.mark.parametrize("pruned", [False, True])
def test_handle_reports_what_was_sampled(pruned):
    model = Product()
    if pruned:  # the parameter is another one, and F.linear is given a product with its mask
        nn.utils.prune.l1_unstructured(model.linear, "weight", 0.5)
    optimizer = SO(model.parameters(), density_ratio=0.1)
    handle = sample_gradients(model, optimizer)
    expected = "sampled gradients in 2 matrices, 12 of 128 entries; whole in 0 others"
    assert repr(handle) == f"expected: {expected}"
    model(torch.randn(5, 8)).sum().backward()
    name = "linear.weight_orig" if pruned else "linear.weight"
    head, *lines = repr(handle).splitlines()
    sampled = dict(model.named_parameters())[name].grad.is_sparse
    assert sampled is not pruned and not model.W.grad.is_sparse
    if pruned:
        assert head == "sampled gradients in 0 matrices, 0 of 0 entries; whole in 2 others"
    else:
        assert head == "sampled gradients in 1 matrices, 6 of 64 entries; whole in 1 others"
    assert "    whole: W (not used by F.linear only, or compiled)" in lines
    optimizer.step()


@pytest.mark.parametrize("layer", [nn.LSTMCell(8, 8), nn.GRUCell(8, 8), nn.EmbeddingBag(9, 8)])
def test_fused_modules_are_expected_whole(layer):
    model = nn.ModuleList([layer, nn.Linear(8, 8)])
    handle = sample_gradients(model, SO(model.parameters(), density_ratio=0.1))
    assert [id(p) for p in handle.params] == [id(model[1].weight)]
