"""Weight gradients at SO's support alone: exact, and nearly for nothing.

SO reads k entries of each weight's gradient, and draws them at random, before the forward pass.
Entry (i, j) of the gradient of W in y = x W^T + b is a product of two columns,

    dW[i, j] = sum over tokens of dy[:, i] * x[:, j],

so the forward pass keeps the columns j that occur in the support, not x, and the backward pass
makes k such products, O(tokens * k), not the matrix product dy^T x. The gradient is a sparse COO
tensor, which torch accumulates, clips and unscales, and which SO reads like a strided one.

    optimizer = SO(model.parameters(), lr=3e-4, density_ratio=5e-4)
    sample_gradients(model, optimizer)
    ...  # train as before

Needs torch, and SparseOptimizer.py where the optimizer comes from. It pays while few of the
entries are wanted: from a density of about 1 % on, the matrix product is faster.
"""

import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["SampledGradients", "sample_gradients", "sampled_linear"]

# Products made at once: what a core's cache holds, or elsewhere 64 MiB with both their factors.
CHUNK = {"cpu": 2**18}
CHUNK_ELSEWHERE = 2**23


class _Plan(NamedTuple):
    """Where a support of k entries finds its factors in dy (N, out) and in x (N, in)."""

    positions: Tensor  # (2, k): rows i and columns j
    kept: Tensor | None  # columns of x that the forward pass keeps, (c,); None for all
    slots: Tensor | None  # of each entry's column among these, (k,); None if it is the i-th's own
    in_features: int


_plans = WeakTensorKeyDictionary()  # by support: SO makes a new tensor when it draws
_owners = WeakTensorKeyDictionary()  # by parameter: a weak reference to its SampledGradients


def sampled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor) -> Tensor:
    """Compute `F.linear(x, weight, bias)`, with a gradient of weight at some entries alone.

    Without gradients, or for a frozen weight, it is `F.linear`. Under `torch.autocast` products
    are of its dtype, as there; those of the gradient are summed in float32 at least.

    Args:
        x: Inputs, (..., in), of any strides.
        weight: W, (out, in).
        bias: b, (out,), or None.
        indices: The flat (row-major) entries wanted, increasing and without repeats, (k,) int64;
            not to be changed in place afterwards.

    Returns:
        y, (..., out). Its backward pass gives weight a coalesced sparse gradient of k values.

    Raises:
        ValueError: weight is no matrix, or indices is not a vector of int64.
    """
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return F.linear(x, weight, bias)
    if weight.dim() != 2:
        raise ValueError(f"weight must have two dimensions, not shape {tuple(weight.shape)}")
    if indices.dim() != 1 or indices.dtype != torch.int64:
        raise ValueError(
            f"indices must be int64 of shape (k,), not {indices.dtype} of {tuple(indices.shape)}"
        )
    plan = _plans.get(indices)
    if plan is None or plan.in_features != weight.shape[1]:
        plan = _plans[indices] = _make_plan(indices, weight.shape[1])
    factor = weight.detach()
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, factor, bias = (
            t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, factor, bias)
        )
    return _SampledLinear.apply(x, weight, factor, bias, plan)


def sample_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> "SampledGradients":
    """Give the sparse matrices of an SO optimizer sampled gradients wherever F.linear uses them.

    That is each `nn.Linear`, and each bare parameter that a module hands to `F.linear`. Uses of
    other kinds (`x @ w.T`, an embedding, torch's own `nn.MultiheadAttention`) and all code that
    `torch.compile` has traced still give strided gradients; SO takes both, and their sum.

    Supports are drawn by the first forward pass with gradients after a step, and stay until the
    next step, however many passes are accumulated; gradients must be zeroed between steps.

    The norm that `clip_grad_norm_` sees is that of the k entries, the only ones that exist.

    Args:
        model: The module; none of its attributes changes, only the class of the parameters.
        optimizer: An SO of its parameters, or of some of them.

    Returns:
        A handle, whose `remove()` ends it; also a context manager. It need not be kept.

    Raises:
        ValueError: The optimizer is no SO, or has no sparse matrix of the model's.
    """
    return SampledGradients(model, optimizer)


class SampledGradients:
    """What `sample_gradients` returns.

    Attributes:
        params: The parameters that it covers.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if not hasattr(optimizer, "draw_supports"):
            raise ValueError(f"{type(optimizer).__name__} draws no supports: it must be an SO")
        sparse = {
            id(p)
            for group in optimizer.param_groups
            for p in group["params"]
            if p.dim() == 2 and not group["dense"] and _is_free(p)
        }
        self.params = [p for p in model.parameters() if id(p) in sparse]
        if not self.params:
            raise ValueError(
                "the optimizer has no sparse matrix of this model's: one with two dimensions, in "
                "a group without dense=True, that is not already given sampled gradients"
            )
        self._optimizer = optimizer
        self._ready: set[int] = set()  # ids of those with a support for the coming step
        self._hooks = [
            optimizer.register_step_post_hook(lambda *_: self._ready.clear()),
            optimizer.register_load_state_dict_post_hook(lambda *_: self._ready.clear()),
        ]
        for p in self.params:
            p.__class__ = _SampledParameter
            _owners[p] = weakref.ref(self)  # the optimizer's hooks keep it alive

    def support(self, p: Tensor) -> Tensor | None:
        """Flat entries of p that the coming step reads, drawn where due; None for all."""
        if id(p) not in self._ready:
            self._optimizer.draw_supports()
            self._ready.update(id(q) for q in self.params if q.requires_grad)
        return self._optimizer.state.get(p, {}).get("grad_indices")

    def remove(self) -> None:
        """Give the model and the optimizer back as they were; a second time does nothing."""
        for p in self.params:
            p.__class__ = nn.Parameter
            del _owners[p]
        for hook in self._hooks:
            hook.remove()
        self.params, self._hooks = [], []

    def __enter__(self) -> "SampledGradients":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


class _SampledParameter(nn.Parameter):
    """A parameter that F.linear multiplies by `sampled_linear`; any other use is torch's own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                return _linear(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))


def _owner(p: Tensor) -> SampledGradients | None:
    """Who samples p's gradients; a deep copy of p keeps p's class, but has no owner."""
    return _owners[p]() if p in _owners else None


def _is_free(p: Tensor) -> bool:
    """Whether p is a plain parameter, or the copy of a sampled one."""
    return type(p) in (nn.Parameter, _SampledParameter) and _owner(p) is None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear (whose names of arguments these are), sampled where weight has a support."""
    indices = None
    if weight.requires_grad and (owner := _owner(weight)) is not None:
        indices = owner.support(weight)
    if indices is None:
        return F.linear(input, weight, bias)
    return sampled_linear(input, weight, bias, indices)


class _SampledLinear(torch.autograd.Function):
    """y = x factor^T + b, where factor is W in the dtype of x."""

    @staticmethod
    def forward(ctx, x, weight, factor, bias, plan):
        ctx.plan, ctx.shape, ctx.dtype = plan, weight.shape, weight.dtype
        kept = x if plan.kept is None else _columns(x, plan.kept)  # (..., c)
        ctx.save_for_backward(kept, factor if ctx.needs_input_grad[0] else None)
        return F.linear(x, factor, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        kept, factor = ctx.saved_tensors
        shape = (*dy.shape[:-1], ctx.shape[1])
        dy = dy.reshape(-1, ctx.shape[0])  # (N, out)
        dx = db = dw = None
        if ctx.needs_input_grad[0]:
            dx = dy.mm(factor).view(shape)
        if ctx.needs_input_grad[1]:
            values = _products(dy, kept.reshape(-1, kept.shape[-1]), ctx.plan).to(ctx.dtype)
            dw = torch.sparse_coo_tensor(
                ctx.plan.positions, values, ctx.shape, check_invariants=False, is_coalesced=True
            )
        if ctx.needs_input_grad[3]:
            db = dy.sum(dim=0)
        return dx, dw, None, db, None


def _make_plan(indices: Tensor, in_features: int) -> _Plan:
    """Split flat indices, and choose what is kept of x: at most each wanted column once."""
    rows, columns = indices // in_features, indices % in_features
    kept, slots = columns, None
    if indices.device.type == "cpu":  # elsewhere counting distinct columns waits for the device
        distinct, inverse = columns.unique(return_inverse=True)
        if len(distinct) < len(columns):
            kept, slots = distinct, inverse
    if len(kept) >= in_features:
        kept, slots = None, columns
    return _Plan(torch.stack([rows, columns]), kept, slots, in_features)


def _columns(x: Tensor, columns: Tensor) -> Tensor:
    """Copy columns (c,) of x (..., n): (..., c); on a CPU faster than index_select."""
    return x.gather(-1, columns.expand(*x.shape[:-1], -1))


def _products(dy: Tensor, kept: Tensor, plan: _Plan) -> Tensor:
    """Sum dy[:, i] * x[:, j] over N tokens, some at a time: (N, out), (N, c) -> (k,)."""
    rows = plan.positions[0]
    total = dy.new_zeros(rows.shape, dtype=torch.promote_types(dy.dtype, torch.float32))
    step = max(CHUNK.get(dy.device.type, CHUNK_ELSEWHERE) // max(len(rows), 1), 1)
    for part in (slice(start, start + step) for start in range(0, len(dy), step)):
        product = _columns(dy[part], rows).to(total.dtype)  # (step, k)
        product *= kept[part] if plan.slots is None else _columns(kept[part], plan.slots)
        total += product.sum(dim=0)
    return total
