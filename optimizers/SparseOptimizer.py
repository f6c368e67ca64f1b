"""SO: Adam whose gradients and moments live on a tiny, moving support of each weight matrix.

Mrabah, Richet, Ben Ayed, Granger, "Sparsity Outperforms Low-Rank Projections in Few-Shot
Adaptation", ICCV 2025, https://arxiv.org/abs/2504.12436. For a tensor W of n entries,
k = max(1, floor(n * density_ratio)), and step t:

    S_g ~ k of the n entries, uniform without replacement, on steps 1, T + 1, 2 T + 1, ...
    g   = dL/dW at S_g + weight_decay * W at S_g, and zero elsewhere
    U   = S_m union S_g                                       (S_m = S_g at t = 1)
    m   = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2        at U
    W  -= lr * m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)  at U
    S_m = the k entries of U with the largest |m|

Copy this file and use it like Adam. It needs Python 3.9 and torch 2.4, or later, and nothing else.

    optimizer = SO(model.parameters(), lr=3e-4, density_ratio=5e-4, T=10)
    for inputs, targets in loader:
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

__all__ = ["SO"]


class SO(Optimizer):
    """Adam on a sparse, moving support of each tensor; see the module's docstring.

    The state of a tensor is `step` (t) and, if it is sparse, `grad_indices` (S_g), `indices` (S_m),
    `exp_avg` (m) and `exp_avg_sq` (v), k entries each, the moments in float32 or wider.

    Args:
        params: Tensors, or groups as dicts. A group may override any argument below, and set
            `dense`: True for plain Adam, False for SO. By default tensors of two or more
            dimensions are sparse; the rest (biases, norms) are dense.
        lr, betas, eps: As in Adam.
        weight_decay: L2 penalty, added to the gradient as in Adam; see decoupled_weight_decay.
        density_ratio: Fraction of entries kept, in (0, 1]; 1 - kappa in the paper.
        T: Steps between two draws of the gradient support.
        seed: Seed of the supports. None takes one from torch's global generator at the first draw;
            where torch.distributed is initialized, all processes then use that of rank 0.
        maximize: Ascend instead of descend.
        decoupled_weight_decay: Multiply W at U by 1 - lr * weight_decay before the step, as AdamW
            does with all of W, and leave g alone.
        bias_correction: "tensor", as in the paper: t counts the tensor's steps. "entry": t counts,
            for each entry, the steps since it entered U, so that its first move is lr * sign(g);
            the state then has `entry_steps` (k).
        foreach: Update many tensors at once (True, or None), or one after another by the plain
            function below the class (False). Results agree to rounding.

    Raises:
        ValueError: An argument is out of range, or a parameter is complex or a shard.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        density_ratio: float = 5e-5,
        T: int = 5,
        *,
        seed: int | None = None,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        bias_correction: str = "tensor",
        foreach: bool | None = None,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, dense=None)
        defaults.update(density_ratio=density_ratio, T=T, seed=seed, maximize=maximize)
        defaults.update(decoupled_weight_decay=decoupled_weight_decay)
        defaults.update(bias_correction=bias_correction, foreach=foreach)
        self._ready: set[Tensor] = set()  # tensors that have their support for the coming step
        self._local_seeds: list[dict] = []  # groups with a seed that other processes do not know
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.draw_supports(lambda p: p.grad is not None)
        self._ready.clear()
        for group in self.param_groups:
            dense, sparse = [], defaultdict(list)
            for p in sorted(
                group["params"], key=Tensor.numel
            ):  # equal sizes together, for `_segment_topk`
                if p.grad is None or p.numel() == 0:
                    continue
                if _is_dense(p, group):
                    dense.append(p)
                else:
                    self.state[p]["step"] += 1
                    sparse[p.dtype, p.device, _sparse_layout(p.grad)].append(p)
            if dense:
                self._dense_update(dense, group)
            for params in sparse.values():
                self._sparse_update(params, group)
        return loss

    def _sparse_update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Take a step on sparse tensors of one group, dtype, device and layout of gradients."""
        states = [self.state[p] for p in params]
        g = self._read_gradients(params, group)
        beta1, beta2 = group["betas"]
        hyper = dict(lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"])
        if group["foreach"] is False:
            parts = zip(states, g.split([len(state["grad_indices"]) for state in states]))
            updates = [_single_tensor_so(s, g, self._prune_score, **hyper) for s, g in parts]
        else:
            numels = [p.numel() for p in params]
            updates = _multi_tensor_so(states, numels, g, self._prune_score, **hyper)
        for p, (U, update, void) in zip(params, updates):
            self._write(p, U, update, void, group)

    def _read_gradients(self, params: list[Tensor], group: dict[str, Any]) -> Tensor:
        """The g of the module's docstring for all tensors in a row, (sum of k,)."""
        supports = [self.state[p]["grad_indices"] for p in params]
        g = _gather_gradients(params, supports).to(_moment_dtype(params[0]))
        g = -g if group["maximize"] else g
        if group["weight_decay"] != 0 and not group["decoupled_weight_decay"]:
            W = torch.cat([p.take(S_g) for p, S_g in zip(params, supports)])
            g = g + group["weight_decay"] * W.to(g.dtype)
        return g

    def _write(
        self, p: Tensor, U: Tensor, update: Tensor, void: Tensor, group: dict[str, Any]
    ) -> None:
        """Subtract an update from W[U] in p's own memory, after decoupled weight decay."""
        decays = group["weight_decay"] != 0 and group["decoupled_weight_decay"]
        _subtract(p, U, update, void, group["lr"] * group["weight_decay"] if decays else None)

    def _prune_score(self, U: Tensor, m: Tensor, S_m: Tensor) -> Tensor:
        """Score the slots of the union, 0 or more; the k highest are the next S_m."""
        return m.abs()

    @torch.no_grad()
    def draw_supports(self, filter_fn: Callable[[Tensor], bool] | None = None) -> None:
        """Draw the supports of the coming step where a window of T steps begins.

        Afterwards `state[p]["grad_indices"]` lists the entries that the coming step reads. Calling
        this is optional and, until that step, repeatable: `step` draws what nobody has drawn.

        Args:
            filter_fn: Tells which tensors will take part; those that require a gradient by default.
        """
        self._init_seeds(broadcast=True)
        generator = torch.Generator("cpu")
        drawn = defaultdict(list)  # by device: a tensor, its group and its new support
        every = ((group, p) for group in self.param_groups for p in group["params"])
        for position, (group, p) in enumerate(every):
            if _is_dense(p, group) or p.numel() == 0 or p in self._ready:
                continue
            if not (filter_fn(p) if filter_fn else p.requires_grad):
                continue
            step = int(self.state[p].get("step", 0))
            if self.state[p] and step % group["T"]:
                continue
            # A draw depends on seed, position and step only: there is no generator to save, the
            # other tensors do not matter, and it is the same on every device.
            key = f"{group['seed']} {position} {step}".encode()
            generator.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big"))
            k = max(1, int(p.numel() * group["density_ratio"]))
            drawn[p.device].append((p, group, draw_support(p.numel(), k, generator)))
            self._ready.add(p)
        if not any("grad_indices" in state for state in self.state.values()):
            _warn_if_too_sparse([len(new[-1]) for draws in drawn.values() for new in draws])
        for device, draws in drawn.items():  # one copy to each device, which waits for nothing
            params, groups, supports = zip(*draws)
            row = torch.cat(supports).to(device, non_blocking=True)
            for p, group, S_g in zip(params, groups, _split_copy(row, list(map(len, supports)))):
                if "grad_indices" not in self.state[p]:
                    self._init_sparse_state(p, group, S_g)
                self.state[p]["grad_indices"] = S_g

    def _init_sparse_state(self, p: Tensor, group: dict[str, Any], S_g: Tensor) -> None:
        zeros = torch.zeros(S_g.shape, dtype=_moment_dtype(p), device=S_g.device)
        state = self.state[p]
        state["step"] = torch.zeros((), device="cpu")
        state["indices"] = S_g.clone()  # S_m = S_g at t = 1
        state["exp_avg"], state["exp_avg_sq"] = zeros, zeros.clone()
        if group["bias_correction"] == "entry":
            state["entry_steps"] = torch.zeros_like(S_g)

    def _init_seeds(self, broadcast: bool = False) -> None:
        """Draw the seeds that were not given; with `broadcast`, take those of rank 0."""
        for group in self.param_groups:
            if group["seed"] is None:
                group["seed"] = int(torch.randint(2**62, (), device="cpu"))
                self._local_seeds.append(group)
        if broadcast and self._local_seeds and dist.is_available() and dist.is_initialized():
            seeds = [group["seed"] for group in self._local_seeds]
            dist.broadcast_object_list(seeds, src=0)
            for group, seed in zip(self._local_seeds, seeds):
                group["seed"] = seed
            self._local_seeds.clear()

    def _dense_update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update whole tensors with torch's own Adam, half precision through float32 copies."""
        for p in params:
            if not self.state[p]:
                zeros = torch.zeros_like(p, dtype=_moment_dtype(p))
                step = torch.zeros((), device="cpu")
                self.state[p].update(step=step, exp_avg=zeros, exp_avg_sq=zeros.clone())
        names = "exp_avg", "exp_avg_sq", "step"
        exp_avgs, exp_avg_sqs, steps = ([self.state[p][name] for p in params] for name in names)
        weights = [p.to(_moment_dtype(p)) for p in params]
        grads = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in params]
        grads = [grad.to(weight.dtype) for grad, weight in zip(grads, weights)]
        hyper = {name: group[name] for name in ("lr", "weight_decay", "eps", "maximize", "foreach")}
        hyper.update(zip(("beta1", "beta2"), group["betas"]), amsgrad=False)
        update = adamw if group["decoupled_weight_decay"] else adam
        update(weights, grads, exp_avgs, exp_avg_sqs, [], steps, **hyper)
        for p, weight in zip(params, weights):
            if weight is not p:
                p.copy_(weight)

    # What torch.optim asks of an optimizer: groups, state dicts, pickles

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; what it does not set is as the constructor was told."""
        super().add_param_group(param_group)
        try:
            _validate_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return settings and state, as torch's optimizers do; `seed` is never None in it."""
        self._init_seeds()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, also where the parameters had another precision.

        Raises:
            ValueError: It is not the state of an SO of such tensors; nothing is loaded then.
        """
        pairs: list[tuple[Tensor, dict]] = []  # as hooks before ours have left them
        hooks = [
            self.register_load_state_dict_pre_hook(
                lambda _, s: pairs.extend(self._pair_with_saved(s))
            ),
            self.register_load_state_dict_post_hook(lambda _: self._restore(pairs), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"this is not a state dict of SO: {error!r} in it") from error
        finally:
            for hook in hooks:
                hook.remove()

    def _pair_with_saved(self, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, dict]]:
        """Pair each parameter with its saved state, which must fit it."""
        for saved, group in zip(state_dict["param_groups"], self.param_groups):
            _validate_group({**saved, "params": []})
            for number, p in zip(saved["params"], group["params"]):
                if (state := state_dict["state"].get(number, {})) != {}:
                    _validate_state(p, state, _is_dense(p, saved))
                    yield p, state

    def _restore(self, pairs: list[tuple[Tensor, dict]]) -> None:
        """Take state as it was saved: torch has cast it to the dtype of the parameters."""
        for p, state in pairs:
            for name, value in state.items():
                if name == "step":  # a plain number in some files
                    value = torch.tensor(float(value), dtype=torch.float32, device="cpu")
                else:
                    dtype = _moment_dtype(p) if name.startswith("exp_avg") else torch.int64
                    value = value.to(p.device, dtype, copy=True)
                self.state[p][name] = value

    def __getstate__(self) -> dict[str, Any]:
        self._init_seeds()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._ready, self._local_seeds = set(), []


# One step of one tensor, and the same of many tensors at once


def _single_tensor_so(
    state: dict[str, Tensor],
    g: Tensor,
    prune_score: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Take the step of the module's docstring on one tensor, whose gradient at S_g is g.

    The union has one slot for each entry of S_m and one for each of S_g, so that its size does not
    depend on the data: on a GPU, the host would have to wait for it. An entry of both supports has
    two neighboring slots, of which the second one is void.

    Returns:
        The union, what to subtract from W there, and which slots are void, (|S_m| + k,) each.
    """
    S_m, S_g, t = state["indices"], state["grad_indices"], state["step"].item()
    U, order = torch.cat([S_m, S_g]).sort()
    void = torch.zeros_like(U, dtype=torch.bool)
    void[1:] = U[1:] == U[:-1]
    m = torch.cat([beta1 * state["exp_avg"], (1 - beta1) * g])[order]
    v = torch.cat([beta2 * state["exp_avg_sq"], (1 - beta2) * g.square()])[order]
    for moment in (m, v):  # in both supports: the decayed moment plus the new term
        moment[:-1].add_(moment[1:].where(void[1:], 0))
    if "entry_steps" in state:  # bias_correction="entry": t is each entry's own
        t = torch.cat([state["entry_steps"], torch.zeros_like(S_g)])[order]
        t[:-1].add_(t[1:].where(void[1:], 0))
        t += 1
    m_hat, v_hat = m / _bias_correction(beta1, t, m), v / _bias_correction(beta2, t, v)
    update = lr * m_hat / (v_hat.sqrt() + eps)
    keep = prune_score(U, m, S_m).masked_fill(void, -1).topk(len(S_g)).indices
    state.update(indices=U[keep], exp_avg=m[keep], exp_avg_sq=v[keep])
    if "entry_steps" in state:
        state["entry_steps"] = t[keep]
    return U, update.masked_fill(void, 0), void


def _multi_tensor_so(
    states: list[dict[str, Tensor]],
    numels: list[int],
    g: Tensor,
    prune_score: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Take the step of `_single_tensor_so` on many tensors at once.

    Their entries are numbered as one long row: entry i of tensor j is i + offsets[j]. The unions of
    all tensors are then one sorted row, of which sizes[j] slots belong to tensor j.

    Args:
        states: The tensors' states.
        numels: How many entries each tensor has.
        g: The gradients at all S_g, (sum of k,).
    """
    ks = [len(state["grad_indices"]) for state in states]
    sizes = [len(state["indices"]) + k for state, k in zip(states, ks)]
    offsets = list(accumulate(numels, initial=0))[:-1]

    def cat(name: str) -> Tensor:
        return torch.cat([state[name] for state in states])

    def repeat(values: list, counts: list[int], dtype: torch.dtype) -> Tensor:
        return _repeat_each(values, counts, g.device, dtype)

    S_g = cat("grad_indices") + repeat(offsets, ks, torch.int64)
    S_m = cat("indices") + repeat(offsets, [len(s["indices"]) for s in states], torch.int64)
    U, order = torch.cat([S_m, S_g]).sort()
    void = torch.zeros_like(U, dtype=torch.bool)
    void[1:] = U[1:] == U[:-1]
    m = torch.cat([beta1 * cat("exp_avg"), (1 - beta1) * g]).index_select(0, order)
    v = torch.cat([beta2 * cat("exp_avg_sq"), (1 - beta2) * g.square()]).index_select(0, order)
    rows = {"exp_avg": m, "exp_avg_sq": v}
    if "entry_steps" in states[0]:
        t = torch.cat([cat("entry_steps"), torch.zeros_like(S_g)]).index_select(0, order)
        rows["entry_steps"] = t
    for row in rows.values():
        row[:-1].add_(row[1:].where(void[1:], 0))
    if "entry_steps" in states[0]:
        t += 1
        bias1, bias2 = (_bias_correction(beta, t, m) for beta in (beta1, beta2))
    else:
        steps = [state["step"].item() for state in states]
        bias1, bias2 = (repeat([1 - b**t for t in steps], sizes, m.dtype) for b in (beta1, beta2))
    update = (lr / bias1 * m).div_((v / bias2).sqrt_().add_(eps)).masked_fill_(void, 0)

    score = prune_score(U, m, S_m).masked_fill_(void, -1)
    keep = _segment_topk(score, sizes, ks)
    rows["indices"] = U.sub_(repeat(offsets, sizes, torch.int64))
    for name, row in rows.items():
        for state, part in zip(states, _split_copy(row.index_select(0, keep), ks)):
            state[name] = part
    return zip(U.split(sizes), update.split(sizes), void.split(sizes))


def _bias_correction(beta: float, t: float | Tensor, like: Tensor) -> float | Tensor:
    """1 - beta^t, for a number of steps or for one of each entry."""
    if not isinstance(t, Tensor):
        return 1 - beta**t
    return -torch.expm1(t.to(like.dtype) * math.log(max(beta, 1e-300)))


def _segment_topk(score: Tensor, sizes: list[int], ks: list[int]) -> Tensor:
    """Positions of the ks[j] highest scores in each segment, of sizes[j], of a row."""
    found, start = [], 0
    for (size, k), same in groupby(zip(sizes, ks)):
        segments = len(list(same))
        part = score[start : start + segments * size].view(segments, size)
        first = torch.arange(start, start + segments * size, size, device=score.device)
        found.append((first[:, None] + part.topk(k, dim=-1, sorted=False).indices).view(-1))
        start += segments * size
    return torch.cat(found)


def _repeat_each(
    values: list, counts: list[int], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Repeat values[j] counts[j] times, (sum of counts,); (1,) where all are the same.

    The copies wait for nothing, as they are not pinned and the sum is known here.
    """
    row = torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)
    if len(set(values)) == 1:
        return row[:1]
    times = torch.tensor(counts, device="cpu").to(device, non_blocking=True)
    return row.repeat_interleave(times, output_size=sum(counts))


def _split_copy(row: Tensor, sizes: list[int]) -> list[Tensor]:
    """Split a row (sum of sizes,) into tensors of their own memory: a view keeps the row alive."""
    parts = [row.new_empty(size) for size in sizes]
    torch.split_with_sizes_copy(row, sizes, out=parts)
    return parts


# What a step reads and writes


def draw_support(numel: int, k: int, generator: torch.Generator) -> Tensor:
    """Draw k of numel flat indices, uniformly without replacement: (k,) int64, increasing.

    Repeats are drawn again until k distinct indices are left, which by symmetry is a uniform
    subset; it costs O(k log k) and never a permutation of numel.
    """
    if 4 * k > numel:  # repeats would be many; a permutation is no larger than four supports
        return torch.randperm(numel, generator=generator, device="cpu")[:k].sort().values
    support = torch.empty(0, dtype=torch.int64, device="cpu")
    while len(support) < k:
        more = torch.randint(numel, (k - len(support),), generator=generator, device="cpu")
        support = torch.cat([support, more]).unique()
    return support


def _gather_gradients(params: list[Tensor], supports: list[Tensor]) -> Tensor:
    """Gradients at S_g, (sum of k,): strided ones, or sparse COO ones, zero where absent."""
    grads = [p.grad for p in params]
    if _sparse_layout(grads[0]) is None:
        return torch.cat([grad.take(S_g) for grad, S_g in zip(grads, supports)])
    device, nnz = grads[0].device, [grad._nnz() for grad in grads]
    offsets = list(accumulate((p.numel() for p in params), initial=0))[:-1]

    def repeat(values: list[int], counts: list[int]) -> Tensor:
        return _repeat_each(values, counts, device, torch.int64)

    S_g = torch.cat(supports) + repeat(offsets, [len(S_g) for S_g in supports])
    flat = repeat(offsets, nnz)
    for dim, position in enumerate(torch.cat([grad._indices() for grad in grads], dim=1)):
        strides = [grad.shape[dim + 1 :].numel() for grad in grads]
        flat = flat + position * repeat(strides, nnz)
    values = torch.cat([grad._values() for grad in grads])  # (nnz, ...): entries, or whole rows
    row = torch.arange(values.shape[1:].numel(), device=device)
    flat = (flat[:, None] + row).view(-1)
    slot = torch.searchsorted(S_g, flat).clamp_(max=len(S_g) - 1)
    found = values.reshape(-1).where(S_g[slot] == flat, 0)
    return found.new_zeros(S_g.shape).index_add_(0, slot, found)  # repeated entries add up


def _subtract(
    p: Tensor, U: Tensor, update: Tensor, void: Tensor, shrink: float | Tensor | None
) -> None:
    """Subtract an update, and `shrink` times W, at flat entries of W = p, in p's own memory.

    What is added in void slots is 0, so that they may have an entry in common with others. For
    half precision this asks for integers: the difference of the bits before and after the step.
    """
    W, at = (p.view(-1), (U,)) if p.is_contiguous() else (p, _unravel(U, p.shape))
    before = W[at] if shrink is not None or p.dtype != update.dtype else None
    if shrink is not None:
        update = update + (shrink * before.to(update.dtype)).masked_fill_(void, 0)
    if p.dtype != update.dtype:
        after = (before.to(update.dtype) - update).to(p.dtype)
        W, update = W.view(torch.int16), before.view(torch.int16) - after.view(torch.int16)
    if p.is_contiguous():
        W.index_add_(0, U, update, alpha=-1)
    else:
        W.index_put_(at, -update, accumulate=True)


def _unravel(flat: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """The index in each dimension of flat (row-major) indices."""
    at = []
    for size in reversed(shape):
        at.append(flat % size)
        flat = flat // size
    return tuple(reversed(at))


def _is_dense(p: Tensor, group: dict[str, Any]) -> bool:
    """Whether plain Adam updates this tensor: as its group says, else by its dimensions."""
    return p.dim() < 2 if group["dense"] is None else group["dense"]


def _sparse_layout(grad: Tensor) -> tuple[int, int] | None:
    """What sparse gradients must share to be read together; None for strided ones."""
    if grad.layout != torch.sparse_coo:
        return None
    return grad.sparse_dim(), grad.shape[grad.sparse_dim() :].numel()


def _moment_dtype(p: Tensor) -> torch.dtype:
    """The dtype of p's moments: its own, but float32 for half precision."""
    return torch.promote_types(p.dtype, torch.float32)


def _warn_if_too_sparse(counts: list[int]) -> None:
    """Warn where most sparse tensors keep so few entries that they will barely train."""
    few = sum(k < 10 for k in counts)
    if 2 * few > len(counts):
        warnings.warn(
            f"SO keeps fewer than ten entries of {few} of {len(counts)} sparse tensors, which will "
            "barely train: raise density_ratio (and lr), or put them into a group with dense=True",
            stacklevel=7,  # the line that called step
        )


def _validate_state(p: Tensor, state: dict[str, Any], dense: bool) -> None:
    """Raise ValueError where a saved state is not p's: a step writes where its indices say."""
    supports = [] if dense else [state["grad_indices"], state["indices"]]
    shape = p.shape if dense else state["indices"].shape
    moments = [state["exp_avg"], state["exp_avg_sq"]]
    step = torch.as_tensor(state["step"], device="cpu").flatten().tolist()
    good = len(step) == 1 and 0 <= step[0] < float("inf")
    good &= all(m.shape == shape and m.is_floating_point() and not m.is_meta for m in moments)
    good &= all(t.layout == torch.strided for t in (*supports, *moments))
    if "entry_steps" in state:
        steps = state["entry_steps"]
        good &= not dense and steps.dtype == torch.int64 and steps.shape == shape
    for s in supports if good else ():
        good &= s.dtype == torch.int64 and s.dim() == 1 and 0 < len(s) == len(s.unique())
        good = good and 0 <= int(s.min()) and int(s.max()) < p.numel()
    if not good:
        raise ValueError(f"the saved state is not that of a tensor of shape {tuple(p.shape)}")


def _validate_group(group: dict[str, Any]) -> None:
    """Raise ValueError where a setting of a group is out of range, or a parameter is unfit."""
    beta1, beta2 = group["betas"] if len(group["betas"]) == 2 else (1, 1)
    T, seed, kind = group["T"], group["seed"], group["bias_correction"]
    rules = {
        "lr": (group["lr"] >= 0, "0 or more"),
        "eps": (group["eps"] >= 0, "0 or more"),
        "betas": (0 <= beta1 < 1 and 0 <= beta2 < 1, "two numbers in [0, 1)"),
        "weight_decay": (group["weight_decay"] >= 0, "0 or more"),
        "density_ratio": (0 < group["density_ratio"] <= 1, "in (0, 1]"),
        "T": (type(T) is int and T >= 1, "a whole number of steps, 1 or more"),
        "seed": (seed is None or hasattr(seed, "__index__"), "a whole number or None"),
        "bias_correction": (kind in ("tensor", "entry"), "'tensor' or 'entry'"),
    }
    for name in ("maximize", "decoupled_weight_decay"):
        rules[name] = (isinstance(group[name], bool), "True or False")
    for name in ("dense", "foreach"):
        value = group[name]
        rules[name] = (value is None or isinstance(value, bool), "True, False or None")
    for name, (good, allowed) in rules.items():
        if not good:
            raise ValueError(f"{name} must be {allowed}, not {group[name]!r}")
    for p in group["params"]:
        if p.is_complex():
            raise ValueError(f"a parameter of shape {tuple(p.shape)} is complex, not real")
        if hasattr(p, "device_mesh") or getattr(p, "_fsdp_flattened", False):
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is a shard of FSDP's, and SO needs whole "
                "matrices: keep the model whole on each process, as in DistributedDataParallel"
            )
