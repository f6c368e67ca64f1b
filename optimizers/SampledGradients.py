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

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DistributedDataParallel

__all__ = ["SampledGradients", "sample_gradients", "sum_gradients"]

# Products made at once: what a core's cache holds, or elsewhere 64 MiB with both their factors.
CHUNK = {"cpu": 2**18}
DEFAULT_CHUNK = 2**23
# Density from which the whole matrix product is faster, and how many times as early it is so by
# device and half precision. The CPU's were measured (benchmarks/crossover.py); a GPU's follow from
# an H100's bandwidth and arithmetic, and were not.
DENSE_MATMUL_DENSITY = 1 / 150
DENSE_MATMUL_FACTOR = {("cpu", True): 1.4, ("cuda", False): 1.3, ("cuda", True): 10}
# Modules that use their matrices otherwise than by F.linear; the second is the first one's.
OTHER_MODULES = (
    nn.MultiheadAttention, NonDynamicallyQuantizableLinear, nn.RNNBase, nn.RNNCellBase,
    nn.Embedding, nn.EmbeddingBag,
)  # fmt: skip
DDP_ERROR = (
    "DistributedDataParallel cannot reduce sampled gradients: use the model itself and give "
    "sample_gradients a process_group, or leave sample_gradients out"
)


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
            changes until `remove`. Sampling that it has already is removed.
        optimizer: An SO of its parameters, or of some of them.
        process_group: Processes that train replicas of the model, in place of
            DistributedDataParallel: the model becomes that of the group's first process, and all
            gradients are averaged at the end of each backward pass, of sampled ones k values. All
            processes make as many passes.

    Returns:
        A handle, which need not be kept. It prints what is expected to be sampled and, after a
        backward pass, what was; `remove()` ends sampling.

    Raises:
        ValueError: The optimizer is not an SO or has no sparse matrix of the model's, the model is
            in DistributedDataParallel, or a parameter is sharded.
    """
    return SampledGradients(model, optimizer, process_group)


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
        self._optimizer, self._group = optimizer, process_group
        self._refuse_shards()
        self._names, self.dense = _partition_params(model, optimizer.param_groups)
        self.params = list(self._names)
        if not self.params:
            raise ValueError(
                "the optimizer has no sparse matrix of this model's to sample: one with two "
                "dimensions, used by F.linear, in a group without dense=True"
            )
        self._ready: set[Tensor] = set()  # those with a support for the coming step
        self._plans: dict[Tensor, _Plan] = {}
        self._is_sampled: dict[Tensor, bool] = {}  # whether the last gradient was
        self._mixed: set[Tensor] = set()  # whose gradient may have entries of an earlier support
        for p in self.params:
            if getattr(p, "_sampler", None) is not None:
                p._sampler.remove()
            p.__class__, p._sampler = _SampledParameter, self
        self._hooks = [
            optimizer.register_step_pre_hook(self._refuse_shards),
            optimizer.register_step_post_hook(lambda *_: self._ready.clear()),
            optimizer.register_load_state_dict_post_hook(lambda *_: self._ready.clear()),
        ]
        for p in self.params:  # a hook that referred to self would keep p alive
            hook = p.register_post_accumulate_grad_hook(lambda p: p._sampler._coalesce(p))
            self._hooks.append(hook)
        self._queued = self._averaged = False
        if process_group is not None:
            self._replicate(model)

    def __repr__(self) -> str:
        """What the last backward pass did, or, before the first one, what is expected."""
        expected = not self._is_sampled
        count = sum(self._is_sampled.get(p, expected) for p in self.params)
        head = f"sampled gradients in {count} matrices, whole ones in {len(self.dense)} others"
        lines = [f"    whole: {name} ({reason})" for name, reason in self.dense.items()]
        return "\n".join([f"expected: {head}" if expected else head, *lines])

    def remove(self) -> None:
        """End sampling: later gradients are whole; weights stay as trained. May be repeated."""
        for p in self.params:
            p.__class__ = nn.Parameter
            del p._sampler
        for hook in self._hooks:
            hook.remove()
        self.params, self._hooks = [], []

    def plan(self, p: Tensor) -> "_Plan | None":
        """Where p's gradient is read in the coming step, drawn where due; None for everywhere."""
        if p not in self._ready:
            if DistributedDataParallel._active_ddp_module is not None:
                raise RuntimeError(DDP_ERROR)
            self._optimizer.draw_supports()
            self._ready.update(q for q in self.params if q.requires_grad)
            new = {}
            for q in self.params:
                support = self._optimizer.state.get(q, {}).get("grad_indices")
                plan = self._plans.get(q)
                if support is not None and (plan is None or plan.support is not support):
                    new[q] = support
                    left = q.grad is not None and q.grad.is_sparse and q.grad._nnz() > 0
                    (self._mixed.add if left else self._mixed.discard)(q)
            self._plans.update(_make_plans(new))
        return self._plans.get(p)

    def _coalesce(self, p: Tensor) -> None:
        """Record whether a new gradient is sampled, and sum the k entries of each use and pass.

        autograd appends them, and drops the mark without which `clip_grad_norm_` would sort them.
        """
        if p.grad is None:
            return
        name = self._names[p]
        self._is_sampled[p] = p.grad.is_sparse
        if not p.grad.is_sparse:
            self.dense[name] = "not used by F.linear only, or compiled"
            return
        self.dense.pop(name, None)
        if p in self._mixed:
            p.grad = p.grad.coalesce()
            return
        plan, values = self._plans[p], p.grad._values()
        if len(values) > len(plan.support):
            values = values.view(-1, len(plan.support)).sum(dim=0)
        p.grad = plan.gradient(values)

    def _refuse_shards(self, *_: Any) -> None:
        for group in self._optimizer.param_groups:
            if any(hasattr(p, "device_mesh") for p in group["params"]):
                raise ValueError(
                    "sampled gradients and shards (DTensor, fully_shard) do not go together: leave "
                    "sample_gradients out, or keep the matrices whole"
                )

    def _replicate(self, model: nn.Module) -> None:
        """Give all processes the first one's model, and average what they add to its gradients."""
        for t in (*model.parameters(), *model.buffers()):
            value = t.detach().contiguous()
            dist.broadcast(value, dist.get_global_rank(self._group, 0), group=self._group)
            t.detach().copy_(value)
        groups = self._optimizer.param_groups
        others = (p for group in groups for p in group["params"])  # such as a temperature
        self._replicated = list(dict.fromkeys((*model.parameters(), *others)))
        for p in self._replicated:
            if p.requires_grad:
                self._hooks.append(p.register_post_accumulate_grad_hook(self._queue_all_reduce))
        self._hooks.append(self._optimizer.register_step_pre_hook(self._sync_before_step))

    def _queue_all_reduce(self, _: Tensor) -> None:
        """Have this backward pass end with `_all_reduce_gradients`."""
        if not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._all_reduce_gradients)

    def _sync_before_step(self, *_: Any) -> None:
        """Before a step, take part in the average of the others if no backward pass did."""
        if not self._averaged:
            self._all_reduce_gradients()
        self._averaged = False

    def _all_reduce_gradients(self) -> None:
        """Average the gradients; repeating it changes nothing, as what is equal stays equal."""
        self._queued, self._averaged = False, True
        sum_gradients(self._replicated, self._group, average=True)


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
        sampler = getattr(p, "_sampler", None)
        plan = None if sampler is None else sampler.plan(p)
        if p.grad is None:
            zeros = p.new_zeros(p.shape if plan is None else plan.support.shape)
            p.grad = zeros if plan is None else plan.gradient(zeros)
        elif p.grad.is_sparse and plan is None:  # an embedding's, whose rows are others elsewhere
            p.grad = p.grad.to_dense()
        values = p.grad._values() if p.grad.is_sparse else p.grad
        rows[values.dtype, values.device].append(values)
    for t in extra:
        rows[t.dtype, t.device].append(t)
    for tensors in rows.values():
        row = _flatten_dense_tensors(tensors)
        dist.all_reduce(row, group=process_group)
        if average:
            row /= dist.get_world_size(process_group)
        torch._foreach_copy_(tensors, _unflatten_dense_tensors(row, tensors))


def _partition_params(model: nn.Module, groups: list[dict]) -> tuple[dict, dict]:
    """The sparse tensors to sample, with their names; the names of others, and why."""
    flags = {p: group["dense"] for group in groups for p in group["params"]}
    users = defaultdict(list)
    for module in model.modules():
        for p in module.parameters(recurse=False):
            users[p].append(module)
    sampled, dense = {}, {}
    for name, p in model.named_parameters():
        is_dense = flags.get(p, True)
        if is_dense is None:  # SO decides
            is_dense = sum(size > 1 for size in p.shape) < 2
        if is_dense:
            continue
        if p.dim() != 2:
            dense[name] = f"{p.dim()} dimensions"
        elif all(isinstance(module, OTHER_MODULES) for module in users[p]):
            dense[name] = "not used by F.linear"
        elif type(p) not in (nn.Parameter, _SampledParameter):
            dense[name] = f"of class {type(p).__name__}"
        else:
            sampled[p] = name
    return sampled, dense


class _Sampled:
    """Tensors that F.linear multiplies with a sampled gradient; other uses are torch's own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return func(*args, **kwargs)
            if func is F.linear:
                return _linear(*args, **kwargs)
            result = func(*args, **kwargs)
            if func is Tensor.__getitem__ and isinstance(args[1], slice):
                parent, rows = args
                if isinstance(parent, _SampledParameter) and rows.step in (None, 1):
                    result.__class__ = _SampledRows
                    result.parent, result.rows = parent, rows
            return result


class _SampledParameter(_Sampled, nn.Parameter):
    """A parameter with a `_sampler`, or a deep copy of one, which has none."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_sampler"}


class _SampledRows(_Sampled, Tensor):
    """Rows of a sampled parameter; to all but F.linear they are what torch's own slice is."""


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear (whose names of arguments these are), sampled where weight has a support."""
    parent, rows = weight, slice(None)
    if isinstance(weight, _SampledRows):
        parent, rows = weight.parent, weight.rows
    sampler = getattr(parent, "_sampler", None)
    plan = sampler.plan(parent) if sampler is not None and parent.requires_grad else None
    if plan is None:
        return F.linear(input, weight, bias)
    return _SampledLinear.apply(input, parent, bias, plan, rows)


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
        ctx.plan, ctx.dtype, ctx.first = plan, weight.dtype, rows.indices(len(weight))[0]
        x_columns = x  # (..., c)
        if plan.columns is not None:  # gather, as on a CPU it is faster than index_select
            x_columns = x.gather(-1, plan.columns.expand(*x.shape[:-1], -1))
        ctx.save_for_backward(x_columns, factor if ctx.needs_input_grad[0] else None)
        return F.linear(x, factor, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x_columns, factor = ctx.saved_tensors
        x_shape = (*dy.shape[:-1], ctx.plan.shape[1])
        dy = dy.reshape(-1, dy.shape[-1])  # (N, rows)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = dy.mm(factor).view(x_shape)
        if ctx.needs_input_grad[1]:
            x_columns = x_columns.reshape(-1, x_columns.shape[-1])
            dw = ctx.plan.gradient(_products(dy, x_columns, ctx.plan, ctx.first).to(ctx.dtype))
        if ctx.needs_input_grad[2]:
            db = dy.sum(dim=0)
        return dx, dw, db, None, None


class _Plan(NamedTuple):
    """Where the entries of a support find their factors in dy (N, out) and in x (N, in)."""

    shape: torch.Size  # of W
    support: Tensor  # (k,) flat
    positions: Tensor  # (2, k): rows i and columns j
    columns: Tensor | None  # columns of x that the forward pass keeps, (c,); None for all
    column_pos: Tensor | None  # of each entry's column among these, (k,); None if all are in order

    def gradient(self, values: Tensor) -> Tensor:
        """The coalesced sparse COO tensor with these values (k,)."""
        return torch.sparse_coo_tensor(
            self.positions, values, self.shape, check_invariants=False, is_coalesced=True
        )


def _make_plans(supports: Mapping[Tensor, Tensor]) -> dict[Tensor, _Plan]:
    """Split flat indices into rows and columns, and choose the columns of each x.

    All positions are computed in one row, since on a GPU each kernel counts.
    """
    if not supports:
        return {}
    widths, sizes = [W.shape[1] for W in supports], [len(support) for support in supports.values()]
    row = torch.cat(list(supports.values()))
    table = torch.tensor([widths, sizes], device="cpu").to(row.device, non_blocking=True)
    width = table[0].repeat_interleave(table[1], output_size=len(row))
    positions = [row.new_empty(2, size) for size in sizes]  # contiguous: autograd copies others
    torch.split_with_sizes_copy(
        torch.stack([row // width, row % width]), sizes, dim=1, out=positions
    )
    plans = {}
    for (W, support), position in zip(supports.items(), positions, strict=True):
        columns, column_pos = position[1], None
        if row.device.type == "cpu":  # elsewhere counting distinct columns waits for the device
            columns, column_pos = columns.unique(return_inverse=True)
        if len(columns) >= W.shape[1]:
            columns, column_pos = None, position[1]
        plans[W] = _Plan(W.shape, support, position, columns, column_pos)
    return plans


def _products(dy: Tensor, x_columns: Tensor, plan: _Plan, first: int) -> Tensor:
    """Sum dy[:, i - first] * x[:, j] over N tokens: (N, rows), (N, c) -> (k,)."""
    rows, column_pos, k = plan.positions[0], plan.column_pos, len(plan.support)
    is_slice = dy.shape[1] < plan.shape[0]
    if is_slice:
        rows = rows - first
        inside = (rows >= 0) & (rows < dy.shape[1])  # entries elsewhere have no gradient here
        rows = rows.clamp(0, dy.shape[1] - 1)
    density = k / (dy.shape[1] * plan.shape[1])
    factor = DENSE_MATMUL_FACTOR.get((dy.device.type, dy.dtype.itemsize == 2), 1)
    if density * factor >= DENSE_MATMUL_DENSITY:
        if column_pos is None:
            column_pos = torch.arange(k, device=dy.device)
        total = dy.t().mm(x_columns)[rows, column_pos]
    else:
        step, total = max(CHUNK.get(dy.device.type, DEFAULT_CHUNK) // k, 1), None
        exact = torch.promote_types(dy.dtype, torch.float32)
        for dy_part, x_part in zip(dy.split(step), x_columns.split(step), strict=True):
            product = dy_part.gather(1, rows.expand(len(dy_part), -1)).to(exact)  # (step, k)
            if column_pos is not None:
                x_part = x_part.gather(1, column_pos.expand(len(x_part), -1))
            product *= x_part
            chunk = product.sum(dim=0)
            total = chunk if total is None else total.add_(chunk)
    return total * inside if is_slice else total
