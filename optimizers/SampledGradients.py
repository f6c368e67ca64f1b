"""Weight gradients at SO's support only: exact, and nearly for nothing.

SO reads k entries of each weight's gradient, and draws them at random, before the forward pass.
Entry (i, j) of the gradient of W in y = x W^T + b is a product of two columns,

    dW[i, j] = sum over tokens of dy[:, i] * x[:, j],

so the forward pass keeps the columns j that occur in the support, not x, and the backward pass
makes k such products, O(tokens * k), not the matrix product dy^T x. The gradient is a coalesced
sparse COO tensor, which torch accumulates, clips and unscales, and which SO reads like others.

    optimizer = SO(model.parameters(), lr=3e-4, density_ratio=5e-4)
    print(sample_gradients(model, optimizer))
    ...  # train as before

Needs torch, and SparseOptimizer.py where the optimizer comes from. From a density of
DENSE_MATMUL_DENSITY on, values are taken from the matrix product, which is faster then.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["SampledGradients", "sample_gradients", "sampled_linear", "sum_gradients"]

# Products made at once: what a core's cache holds, or elsewhere 64 MiB with both their factors.
CHUNK = {"cpu": 2**18}
DEFAULT_CHUNK = 2**23
# Density from which the whole matrix product is faster: for float32 factors on a CPU, and how many
# times as early it is otherwise. The CPU's were measured (benchmarks/crossover.py); a GPU's follow
# from an H100's bandwidth and arithmetic, and were not.
DENSE_MATMUL_DENSITY = 1 / 150
DENSE_MATMUL_FACTOR = {
    ("cpu", False): 1,
    ("cpu", True): 1.4,
    ("cuda", False): 1.3,
    ("cuda", True): 10,
}
# Modules that use their matrices otherwise than by F.linear.
FUSED_MODULES = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
DDP_ERROR = (
    "DistributedDataParallel cannot reduce sampled gradients: use the model itself and give "
    "sample_gradients a process_group, or leave sample_gradients out"
)


class _Plan(NamedTuple):
    """Where a support of k entries finds its factors in dy (N, out) and in x (N, in)."""

    support: Tensor  # (k,) flat
    positions: Tensor  # (2, k): rows i and columns j
    columns: Tensor | None  # columns of x that the forward pass keeps, (c,); None for all
    column_pos: (
        Tensor | None
    )  # of each entry's column among these, (k,); None if it is the i-th's own
    in_features: int


_handles = WeakTensorKeyDictionary()  # by parameter: a weak reference to its SampledGradients


def sample_gradients(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    process_group: "dist.ProcessGroup | None" = None,
) -> "SampledGradients":
    """Give the sparse matrices of an SO optimizer sampled gradients wherever F.linear uses them.

    That is each `nn.Linear`, and each bare parameter, or slice of its rows, that a module hands to
    `F.linear`. Uses of other kinds (`x @ w.T`, an embedding, torch's own `nn.MultiheadAttention`)
    and all code that `torch.compile` has traced still give strided gradients; SO takes both, and
    their sum. (Torch cannot add those of an `nn.Embedding(sparse=True)` that shares a matrix.)

    Supports are drawn by the first forward pass with gradients after a step, and stay until the
    next step, however many passes are accumulated; gradients must be zeroed between steps. The
    norm that `clip_grad_norm_` sees is that of the k entries, the only ones that exist. There are
    no second derivatives. Call it before wrappers such as `accelerator.prepare`.

    Args:
        model: The module. Its values and attributes stay as they are; the class of the parameters
            changes until `remove`.
        optimizer: An SO of its parameters, or of some of them.
        process_group: Processes that train replicas of the model, in place of
            DistributedDataParallel: the model becomes that of the group's first process, and all
            gradients are averaged at the end of each backward pass, of sampled ones k values. All
            processes make as many passes.

    Returns:
        A handle. It prints what is expected to be sampled and, after a backward pass, what was;
        `remove()` ends sampling. It is also a context manager, and need not be kept.

    Raises:
        ValueError: The optimizer is not an SO or has no sparse matrix of the model's, sampling is
            already active, the model is in DistributedDataParallel, or a parameter is sharded.
    """
    return SampledGradients(model, optimizer, process_group)


def sampled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor, rows: slice = slice(None)
) -> Tensor:
    """Compute `F.linear(x, weight[rows], bias)`, with a gradient of weight at some entries only.

    Without gradients, or for a frozen weight, it is `F.linear`. Under `torch.autocast` products
    are of its dtype, as there; those of the gradient are summed in float32 at least.

    Args:
        x: Inputs, (..., in), of any strides.
        weight: W, (out, in).
        bias: b of these rows, or None.
        indices: The flat (row-major) entries of W wanted, increasing and without repeats, (k,)
            int64; not to be changed in place afterwards.
        rows: Those of W that are used, where a packed matrix is used in parts.

    Returns:
        y, (..., rows). Its backward pass gives weight a coalesced sparse gradient of k values.

    Raises:
        ValueError: weight is not a matrix, or indices is not a vector of int64.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must have two dimensions, not shape {tuple(weight.shape)}")
    if indices.dim() != 1 or indices.dtype != torch.int64:
        raise ValueError(
            f"indices must be int64 of shape (k,), not {indices.dtype} of {tuple(indices.shape)}"
        )
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return F.linear(x, weight[rows], bias)
    (plan,) = _make_plans([indices], [weight.shape[1]])
    return _SampledLinear.apply(x, weight, bias, plan, rows)


class SampledGradients:
    """What `sample_gradients` returns.

    Attributes:
        params: The matrices that get sampled gradients wherever F.linear uses them.
        dense: The optimizer's other sparse tensors of the model, by name, and why their gradients
            stay whole. A backward pass adds those that it gave whole gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        if not hasattr(optimizer, "draw_supports"):
            raise ValueError(f"sampled gradients need an SO, not {type(optimizer).__name__}")
        if isinstance(model, DistributedDataParallel):
            raise ValueError(DDP_ERROR)
        _refuse_shards(optimizer)
        names, self.dense = _partition_params(model, optimizer.param_groups)
        self._names, self.params = {id(p): name for name, p in names.items()}, list(names.values())
        self._is_sampled: dict[int, bool] = {}  # by id, whether the last gradient was
        if any(_handle_of(p) is not None for p in self.params):
            raise ValueError("sampling is already active for this model: remove() it first")
        if not self.params:
            raise ValueError(
                "the optimizer has no sparse matrix of this model's to sample: one with two "
                "dimensions, used by F.linear, in a group without dense=True"
            )
        self._optimizer = optimizer
        self._plans: dict[int, _Plan] = {}  # by id of the parameter, for the coming step
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: _refuse_shards(optimizer)),
            optimizer.register_step_post_hook(self._post_step),
            optimizer.register_load_state_dict_post_hook(lambda *_: self._ready.clear()),
            *(p.register_post_accumulate_grad_hook(_coalesce) for p in self.params),
        ]
        self._ready: set[int] = set()  # ids of those with a support for the coming step
        for p in self.params:
            p.__class__ = _SampledParameter
            _handles[p] = weakref.ref(self)  # the optimizer's hooks keep it alive
        self._group, self._queued, self._averaged = process_group, False, False
        if process_group is not None:
            self._replicate(model)

    def __repr__(self) -> str:
        """What the last backward pass did, or, before the first one, what is expected."""
        expected = not self._is_sampled
        sampled = [p for p in self.params if expected or self._is_sampled.get(id(p))]
        ids, k, entries = set(map(id, sampled)), 0, 0
        for group in self._optimizer.param_groups:
            sizes = [p.numel() for p in group["params"] if id(p) in ids]
            entries += sum(sizes)
            k += sum(max(1, int(n * group["density_ratio"])) for n in sizes)
        missing = len(self.params) - len(self._is_sampled)
        lines = [
            f"{'expected: ' * expected}sampled gradients in {len(sampled)} matrices, {k:,} of "
            f"{entries:,} entries; whole in {len(self.dense)} others",
            *(f"    whole: {name} ({reason})" for name, reason in self.dense.items()),
        ]
        if missing and not expected:
            lines.append(f"    without a gradient so far: {missing}")
        return "\n".join(lines)

    def _replicate(self, model: nn.Module) -> None:
        """Give all processes the first one's model, and average what they add to its gradients."""
        for t in (*model.parameters(), *model.buffers()):
            value = t.detach().contiguous()
            dist.broadcast(value, dist.get_global_rank(self._group, 0), group=self._group)
            t.detach().copy_(value)
        in_groups = (p for group in self._optimizer.param_groups for p in group["params"])
        params = self._replicated = list(dict.fromkeys((*model.parameters(), *in_groups)))
        self._hooks += [
            *(
                p.register_post_accumulate_grad_hook(self._queue_all_reduce)
                for p in params
                if p.requires_grad
            ),
            self._optimizer.register_step_pre_hook(self._sync_before_step),
        ]

    def _queue_all_reduce(self, _: Tensor) -> None:
        """Have this backward pass end with `_all_reduce_gradients`."""
        if not self._queued:
            self._queued = True
            Variable._execution_engine.queue_callback(self._all_reduce_gradients)

    def _sync_before_step(self, *_: Any) -> None:
        """Before a step, take part in the average of the others if no backward pass did."""
        if not self._averaged:
            self._all_reduce_gradients()

    def _all_reduce_gradients(self) -> None:
        """Average the gradients; repeating it changes nothing, as what is equal stays equal."""
        self._queued, self._averaged = False, True
        sum_gradients(self._replicated, self._group, average=True)

    def _post_step(self, *_: Any) -> None:
        """After a step, what was true of it is over."""
        self._ready.clear()
        self._averaged = False

    def remove(self) -> None:
        """End sampling: later gradients are whole; weights stay as trained. May be repeated."""
        for p in self.params:
            p.__class__ = nn.Parameter
            del _handles[p]
        for hook in self._hooks:
            hook.remove()
        self.params, self._hooks, self._plans = [], [], {}

    def __enter__(self) -> "SampledGradients":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def plan(self, p: Tensor) -> _Plan | None:
        """Where p's gradient is read in the coming step, drawn where due; None for everywhere."""
        if id(p) not in self._ready:
            if DistributedDataParallel._active_ddp_module is not None:
                raise RuntimeError(DDP_ERROR)
            self._optimizer.draw_supports()
            self._ready.update(id(q) for q in self.params if q.requires_grad)
            stale, supports = [], []
            for q in self.params:
                support = self._optimizer.state.get(q, {}).get("grad_indices")
                plan = self._plans.get(id(q))
                if support is not None and (plan is None or plan.support is not support):
                    stale.append(q)
                    supports.append(support)
            plans = _make_plans(supports, [q.shape[1] for q in stale])
            self._plans.update(zip(map(id, stale), plans, strict=True))
        return self._plans.get(id(p))


@torch.no_grad()
def sum_gradients(
    params: Iterable[Tensor],
    process_group: "dist.ProcessGroup | None" = None,
    average: bool = False,
    extra: Iterable[Tensor] = (),
) -> None:
    """Sum gradients over processes, in one row of numbers, or one for each dtype.

    Sampled gradients are k values in it. A gradient that a process has not counts as zero.
    Afterwards all have the same, bit for bit.

    Args:
        params: Parameters that all processes have in the same order; frozen ones are left out.
        process_group: The processes; None for all.
        average: Divide by the number of processes.
        extra: Tensors to sum with them, in place.
    """
    rows = defaultdict(list)
    for p in (p for p in params if p.requires_grad):
        plan = None if _handle_of(p) is None else _handle_of(p).plan(p)
        if p.grad is None:
            values = p.new_zeros(p.shape if plan is None else plan.support.shape)
            p.grad = values if plan is None else _sparse(plan, values, p.shape)
        elif p.grad.is_sparse and plan is None:  # an embedding's, whose rows are others elsewhere
            p.grad = p.grad.to_dense()
        values = p.grad._values() if p.grad.is_sparse else p.grad
        rows[values.dtype, values.device].append(values)
    for t in extra:
        rows[t.dtype, t.device].append(t)
    for some in rows.values():
        row = torch.cat([t.reshape(-1) for t in some])
        dist.all_reduce(row, group=process_group)
        if average:
            row /= dist.get_world_size(process_group)
        parts = row.split([t.numel() for t in some])
        torch._foreach_copy_(
            some, [part.view(t.shape) for part, t in zip(parts, some, strict=True)]
        )


def _refuse_shards(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError where a parameter is sharded."""
    for group in optimizer.param_groups:
        if any(hasattr(p, "device_mesh") for p in group["params"]):
            raise ValueError(
                "sampled gradients and shards (DTensor, fully_shard) do not go together: leave "
                "sample_gradients out, or keep the matrices whole"
            )


def _is_sparse(p: Tensor, group: dict[str, Any]) -> bool:
    """Whether SO takes p for a sparse tensor."""
    return sum(size > 1 for size in p.shape) >= 2 if group["dense"] is None else not group["dense"]


def _partition_params(
    model: nn.Module, groups: list[dict]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split the sparse tensors, by name, into those to sample and those to leave, and why."""
    sparse = {id(p) for group in groups for p in group["params"] if _is_sparse(p, group)}
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        fused = isinstance(module, FUSED_MODULES)
        for p in module.parameters() if fused else module._parameters.values():
            users.setdefault(id(p), []).append(module)
    sampled, dense = {}, {}
    for name, p in model.named_parameters():
        fused = [type(m).__name__ for m in users[id(p)] if isinstance(m, FUSED_MODULES)]
        if id(p) not in sparse or p.dim() < 2:
            continue
        if p.dim() != 2:
            dense[name] = f"{p.dim()} dimensions"
        elif fused:
            dense[name] = f"used by torch's own {fused[0]}"
        elif all(isinstance(module, EMBEDDINGS) for module in users[id(p)]):
            dense[name] = "an embedding"
        elif type(p) not in (nn.Parameter, _SampledParameter):
            dense[name] = f"of class {type(p).__name__}"
        else:
            sampled[name] = p
    return sampled, dense


class _Sampled:
    """Tensors that F.linear multiplies with a sampled gradient; other uses are torch's own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return func(*args, **(kwargs or {}))
            if func is F.linear:
                return _linear(*args, **(kwargs or {}))
            result = func(*args, **(kwargs or {}))
            if func is Tensor.__getitem__ and isinstance(args[1], slice):
                parent, rows = args
                if isinstance(parent, _SampledParameter) and rows.step in (None, 1) and len(result):
                    result.__class__ = _SampledRows
                    result.parent, result.rows = parent, rows
            return result


class _SampledParameter(_Sampled, nn.Parameter):
    """A parameter whose class `SampledGradients` has set to this one."""


class _SampledRows(_Sampled, Tensor):
    """Rows of a sampled parameter; to all but F.linear they are what torch's own slice is."""


def _handle_of(p: Tensor) -> SampledGradients | None:
    """Who samples p's gradients; a deep copy of p keeps p's class, but has no handle."""
    return _handles[p]() if p in _handles else None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear (whose names of arguments these are), sampled where weight has a support."""
    parent, rows = weight, slice(None)
    if isinstance(weight, _SampledRows):
        parent, rows = weight.parent, weight.rows
    handle = _handle_of(parent) if isinstance(parent, _SampledParameter) else None
    plan = handle.plan(parent) if handle is not None and parent.requires_grad else None
    if plan is None:
        return F.linear(input, weight, bias)
    return _SampledLinear.apply(input, parent, bias, plan, rows)


def _coalesce(p: Tensor) -> None:
    """Note whether a new gradient is sampled; give it its k entries and the mark of coalescing.

    autograd drops the mark, and appends the entries of each use and pass to those before. Without
    it `clip_grad_norm_` would sort the entries of each matrix.
    """
    handle, grad = _handle_of(p), p.grad
    if handle is None or grad is None:
        return
    name, sampled = handle._names[id(p)], grad.layout == torch.sparse_coo
    handle._is_sampled[id(p)] = sampled
    if not sampled:
        handle.dense[name] = "not used by F.linear only, or compiled"
        return
    handle.dense.pop(name, None)
    plan, values = handle._plans[id(p)], grad._values()
    k = len(plan.support)
    if len(values) % k == 0 and len(values) > 0:
        values = values.view(-1, k).sum(dim=0) if len(values) > k else values
        p.grad = _sparse(plan, values, p.shape)


def _sparse(plan: _Plan, values: Tensor, shape: torch.Size) -> Tensor:
    """The coalesced sparse COO tensor of a support's values."""
    return torch.sparse_coo_tensor(
        plan.positions, values, shape, check_invariants=False, is_coalesced=True
    )


class _SampledLinear(torch.autograd.Function):
    """y = x W[rows]^T + b, of autocast's dtype where it is enabled."""

    @staticmethod
    def forward(ctx, x, weight, bias, plan, rows):
        factor, kind = weight[rows], x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, factor, bias = (
                t if t is None or t.dtype == torch.float64 else t.to(dtype)
                for t in (x, factor, bias)
            )
        ctx.plan, ctx.shape, ctx.dtype = plan, weight.shape, weight.dtype
        ctx.first = None if rows == slice(None) else rows.indices(len(weight))[0]
        x_columns = x if plan.columns is None else _gather_columns(x, plan.columns)  # (..., c)
        ctx.save_for_backward(x_columns, factor if ctx.needs_input_grad[0] else None)
        return F.linear(x, factor, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x_columns, factor = ctx.saved_tensors
        shape = (*dy.shape[:-1], ctx.shape[1])
        dy = dy.reshape(-1, dy.shape[-1])  # (N, rows)
        dx = db = dw = None
        if ctx.needs_input_grad[0]:
            dx = dy.mm(factor).view(shape)
        if ctx.needs_input_grad[1]:
            x_columns = x_columns.reshape(-1, x_columns.shape[-1])
            values = _products(dy, x_columns, ctx.plan, ctx.first).to(ctx.dtype)
            dw = _sparse(ctx.plan, values, ctx.shape)
        if ctx.needs_input_grad[2]:
            db = dy.sum(dim=0)
        return dx, dw, db, None, None


def _make_plans(supports: Sequence[Tensor], widths: Sequence[int]) -> list[_Plan]:
    """Split flat indices into rows and columns, and choose the columns of each x.

    All positions are computed in one row, since on a GPU each kernel counts.
    """
    if not supports:
        return []
    sizes, device = [len(support) for support in supports], supports[0].device
    table = torch.tensor([widths, sizes], device="cpu").to(device, non_blocking=True)
    width = table[0].repeat_interleave(table[1], output_size=sum(sizes))
    row = torch.cat(list(supports))
    positions = torch.stack([row // width, row % width])  # (2, sum of sizes)
    parts = [positions.new_empty(2, size) for size in sizes]
    torch.split_with_sizes_copy(positions, sizes, dim=1, out=parts)
    plans = []
    for support, part, in_features in zip(supports, parts, widths, strict=True):
        columns, column_pos = part[1], None
        if device.type == "cpu":  # elsewhere counting distinct columns waits for the device
            distinct, inverse = columns.unique(return_inverse=True)
            if len(distinct) < len(columns):
                columns, column_pos = distinct, inverse
        if len(columns) >= in_features:
            columns, column_pos = None, part[1]
        plans.append(_Plan(support, part, columns, column_pos, in_features))
    return plans


def _gather_columns(x: Tensor, columns: Tensor) -> Tensor:
    """Copy columns (c,) of x (..., n): (..., c); on a CPU faster than index_select."""
    return x.gather(-1, columns.expand(*x.shape[:-1], -1))


def _products(dy: Tensor, x_columns: Tensor, plan: _Plan, first: int | None) -> Tensor:
    """Sum dy[:, i - first] * x[:, j] over N tokens: (N, rows), (N, c) -> (k,)."""
    rows, inside = plan.positions[0], None
    if first is not None:  # a slice of W: entries elsewhere have no gradient here
        rows = rows - first
        inside = (rows >= 0) & (rows < dy.shape[1])
        rows = rows.clamp(0, dy.shape[1] - 1)
    device, exact = dy.device.type, torch.promote_types(dy.dtype, torch.float32)
    density = len(rows) / max(dy.shape[1] * plan.in_features, 1)
    if (
        density * DENSE_MATMUL_FACTOR.get((device, dy.dtype.itemsize == 2), 1)
        >= DENSE_MATMUL_DENSITY
    ):
        product = dy.t().mm(x_columns)  # (rows, c)
        columns = plan.column_pos
        if columns is None:
            columns = torch.arange(len(rows), device=rows.device)
        total = product[rows, columns]
    else:
        step = max(CHUNK.get(device, DEFAULT_CHUNK) // max(len(rows), 1), 1)
        total = None
        for part in (slice(start, start + step) for start in range(0, max(len(dy), 1), step)):
            product = _gather_columns(dy[part], rows).to(exact)  # (step, k)
            product *= (
                x_columns[part]
                if plan.column_pos is None
                else _gather_columns(x_columns[part], plan.column_pos)
            )
            chunk = product.sum(dim=0)
            total = chunk if total is None else total.add_(chunk)
    return total if inside is None else total * inside
