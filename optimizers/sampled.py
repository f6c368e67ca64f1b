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
entries are wanted: from a density of about 1 % on, values are taken from the matrix product, which
is then faster.
"""

import weakref
from collections.abc import Sequence
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
PRODUCT_FROM = 1 / 150  # density from which a CPU is faster with the whole matrix product
COPY = "low_precision"  # attribute of a parameter under which SO looks for a copy to refresh


class _Plan(NamedTuple):
    """Where a support of k entries finds its factors in dy (N, out) and in x (N, in)."""

    positions: Tensor  # (2, k): rows i and columns j
    kept: Tensor | None  # columns of x that the forward pass keeps, (c,); None for all
    slots: Tensor | None  # of each entry's column among these, (k,); None if it is the i-th's own
    in_features: int


_plans = WeakTensorKeyDictionary()  # by support: SO makes a new tensor when it draws
_owners = WeakTensorKeyDictionary()  # by parameter: a weak reference to its SampledGradients


def sampled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    rows: slice = slice(None),
    low: Tensor | None = None,
) -> Tensor:
    """Compute `F.linear(x, weight[rows], bias)`, with a gradient of weight at some entries alone.

    Without gradients, or for a frozen weight, it is `F.linear`. Under `torch.autocast` products
    are of its dtype, as there; those of the gradient are summed in float32 at least.

    Args:
        x: Inputs, (..., in), of any strides.
        weight: W, (out, in).
        bias: b of these rows, or None.
        indices: The flat (row-major) entries of W wanted, increasing and without repeats, (k,)
            int64; not to be changed in place afterwards.
        rows: Those of W that are used, where a packed matrix is used in parts.
        low: W in the dtype of autocast, if there is a copy.

    Returns:
        y, (..., rows). Its backward pass gives weight a coalesced sparse gradient of k values.

    Raises:
        ValueError: weight is no matrix, or indices is not a vector of int64.
    """
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return F.linear(x, weight[rows], bias)
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
    if (dtype := _autocast_dtype(x.device)) is not None:
        factor = factor if low is None else low
        x, factor, bias = (
            t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, factor, bias)
        )
    first, last, _ = rows.indices(len(weight))
    return _SampledLinear.apply(x, weight, factor[first:last], bias, plan, first)


def sample_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> "SampledGradients":
    """Give the sparse matrices of an SO optimizer sampled gradients wherever F.linear uses them.

    That is each `nn.Linear`, and each bare parameter, or slice of its rows, that a module hands to
    `F.linear`. Uses of other kinds (`x @ w.T`, an embedding, torch's own `nn.MultiheadAttention`)
    and all code that `torch.compile` has traced still give strided gradients; SO takes both, and
    their sum. (Torch cannot add those of an `nn.Embedding(sparse=True)` that shares a matrix.)

    Supports are drawn by the first forward pass with gradients after a step, and stay until the
    next step, however many passes are accumulated; gradients must be zeroed between steps.

    Under `torch.autocast` matrices are not cast anew in each pass: each gets one copy of that
    dtype, in which SO refreshes the entries that it moves.

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
        self._copied: dict[int, int] = {}  # versions of matrices, as their copies follow them
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._drop_stale_copies()),
            optimizer.register_step_post_hook(lambda *_: self._stepped()),
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

    @torch.no_grad()
    def low_precision(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of p in a lower precision, made where there is none that follows p."""
        self._drop_stale_copies([p])
        if getattr(p, COPY, p).dtype != dtype:
            # All at once, side by side in the order in which SO goes through matrices: it then
            # refreshes them together.
            alike = [q for q in self.params if (q.dtype, q.device) == (p.dtype, p.device)]
            alike.sort(key=Tensor.numel)
            row = torch.cat([q.flatten().to(dtype) for q in alike])
            for q, part in zip(alike, row.split([q.numel() for q in alike]), strict=True):
                setattr(q, COPY, part.view(q.shape))
                self._copied[id(q)] = q._version
        return getattr(p, COPY)

    def _drop_stale_copies(self, params: Sequence[Tensor] | None = None) -> None:
        """Drop the copies of matrices that others than SO have written to."""
        for p in self.params if params is None else params:
            if hasattr(p, COPY) and self._copied[id(p)] != p._version:
                delattr(p, COPY)

    def _stepped(self) -> None:
        """Note that the supports are used up, and that copies have followed their matrices."""
        self._ready.clear()
        self._copied = {id(p): p._version for p in self.params if hasattr(p, COPY)}

    def remove(self) -> None:
        """Give the model and the optimizer back as they were; a second time does nothing."""
        for p in self.params:
            p.__class__ = nn.Parameter
            p.__dict__.pop(COPY, None)
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
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                if func is F.linear:
                    return _linear(*args, **(kwargs or {}))
                if func is Tensor.__getitem__ and isinstance(args[1], slice):
                    return _SampledRows.of(*args)
            return func(*args, **(kwargs or {}))


class _SampledRows(Tensor):
    """Rows of a sampled parameter; to all but F.linear they are what torch's own slice is."""

    @staticmethod
    def of(parent: Tensor, rows: slice) -> Tensor:
        part = parent[rows]
        if rows.step not in (None, 1) or len(part) == 0:
            return part
        part.__class__ = _SampledRows
        part.parent, part.rows = parent, rows
        return part

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear and torch.is_grad_enabled():
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
    whole, rows = weight, slice(None)
    if isinstance(weight, _SampledRows):
        whole, rows = weight.parent, weight.rows
    owner = _owner(whole) if isinstance(whole, _SampledParameter) else None
    indices = owner.support(whole) if owner is not None and whole.requires_grad else None
    if indices is None:
        return F.linear(input, weight, bias)
    dtype, low = _autocast_dtype(input.device), None
    if dtype is not None and whole.dtype == torch.float32:
        low = owner.low_precision(whole, dtype)
    return sampled_linear(input, whole, bias, indices, rows, low)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products under autocast, None outside of it."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


class _SampledLinear(torch.autograd.Function):
    """y = x factor^T + b, where factor is rows of W, from `first` on, in the dtype of x."""

    @staticmethod
    def forward(ctx, x, weight, factor, bias, plan, first):
        ctx.plan, ctx.first, ctx.shape, ctx.dtype = plan, first, weight.shape, weight.dtype
        kept = x if plan.kept is None else _columns(x, plan.kept)  # (..., c)
        ctx.save_for_backward(kept, factor if ctx.needs_input_grad[0] else None)
        return F.linear(x, factor, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        kept, factor = ctx.saved_tensors
        shape = (*dy.shape[:-1], ctx.shape[1])
        dy = dy.reshape(-1, dy.shape[-1])  # (N, rows)
        dx = db = dw = None
        if ctx.needs_input_grad[0]:
            dx = dy.mm(factor).view(shape)
        if ctx.needs_input_grad[1]:
            kept = kept.reshape(-1, kept.shape[-1])
            values = _products(dy, kept, ctx.plan, ctx.first).to(ctx.dtype)
            dw = torch.sparse_coo_tensor(
                ctx.plan.positions, values, ctx.shape, check_invariants=False, is_coalesced=True
            )
        if ctx.needs_input_grad[3]:
            db = dy.sum(dim=0)
        return dx, dw, None, db, None, None


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


def _products(dy: Tensor, kept: Tensor, plan: _Plan, first: int) -> Tensor:
    """Sum dy[:, i - first] * x[:, j] over N tokens: (N, rows), (N, c) -> (k,)."""
    rows = plan.positions[0] - first
    inside = (rows >= 0) & (rows < dy.shape[1])
    rows = rows.clamp(0, dy.shape[1] - 1)
    exact = torch.promote_types(dy.dtype, torch.float32)
    if len(rows) >= PRODUCT_FROM * dy.shape[1] * plan.in_features and dy.dtype == exact:
        product = dy.t().mm(kept)  # (rows, c)
        columns = plan.slots
        if columns is None:
            columns = torch.arange(len(rows), device=rows.device)
        return product[rows, columns] * inside
    total = dy.new_zeros(rows.shape, dtype=exact)
    step = max(CHUNK.get(dy.device.type, CHUNK_ELSEWHERE) // max(len(rows), 1), 1)
    for part in (slice(start, start + step) for start in range(0, len(dy), step)):
        product = _columns(dy[part], rows).to(total.dtype)  # (step, k)
        product *= kept[part] if plan.slots is None else _columns(kept[part], plan.slots)
        total += product.sum(dim=0)
    return total * inside
