"""SO: Adam whose gradients and moments live on a small, moving support of each weight matrix.

Mrabah, Richet, Ben Ayed, Granger, "Sparsity Outperforms Low-Rank Projections in Few-Shot
Adaptation", ICCV 2025, https://arxiv.org/abs/2504.12436. For a tensor W of n entries,
k = max(1, floor(n * density_ratio)), and step t:

    S_g ~ k of the n entries, uniform without replacement, on steps 1, T + 1, 2 T + 1, ...
    g   = dL/dW at S_g + weight_decay * W at S_g, and zero elsewhere
    U   = S_m union S_g                                       (S_m = S_g at t = 1)
    m   = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2        at U
    W  -= lr * m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)  at U
    S_m = the k entries of U with the largest |m|; elsewhere m = v = 0

Copy this file and use it like Adam: SO(model.parameters(), lr=3e-4, density_ratio=5e-4, T=10).
It needs Python 3.9 and torch 2.4, or later, and nothing else.
"""

from __future__ import annotations

import hashlib
import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

__all__ = ["SO"]
__version__ = "1.1"

STATE_NAMES = ("step", "grad_indices", "indices", "exp_avg", "exp_avg_sq", "entry_steps")
CHUNK = 2**18  # slots updated at once: what a core's cache holds; on GPUs 16 times as many
LARGE = 2**13  # slots from which a table is faster than sorting, on CPUs

Group = State = dict[str, Any]


class SO(Optimizer):
    """Adam on a sparse, moving support of each tensor; see the module's docstring.

    A sparse tensor's state is `step` (t) and `grad_indices` (S_g), `indices` (S_m), `exp_avg` (m),
    `exp_avg_sq` (v) of k entries each; a dense one's is Adam's. Of a sparse DTensor all ranks hold
    the whole state; all-reduces complete the g of each chunk, and each rank writes its shard.

    Args:
        params: Tensors, or groups as dicts. A group may override any argument below, and set
            `dense`: True for plain Adam, False for SO. By default tensors with two or more
            dimensions larger than 1 are sparse; the rest (biases, norms) are dense.
        lr, betas, eps, maximize: As in Adam.
        weight_decay: L2 penalty as in Adam: it rules the sign of the step where gradients are
            small. AdamW's values need `decoupled_weight_decay`.
        density_ratio: Fraction of entries kept, in (0, 1]; 1 - kappa in the paper.
        T: Steps between two draws of the gradient support.
        seed: For supports and rounding; None draws one from torch's generator (on rank 0). Several
            optimizers need different seeds: equal seed, position and step give equal draws.
        decoupled_weight_decay: Multiply W at U by 1 - lr * weight_decay instead, as AdamW does.
        bias_correction: "tensor": t counts the tensor's steps, as in the paper. "entry": t counts
            steps since the entry entered U (`entry_steps`); its first move is lr * sign(g).
        stochastic_rounding: Round half precision at random, right on average, or to the nearest.
        foreach: Update many tensors at once (True, None), or each by `_single_tensor_so` (False).

    Raises:
        ValueError: An argument is out of range, or a parameter is complex, flat (FSDP1) or Partial.
    """

    # Subclasses may rank a chunk's entries (numbered in a row) by score(U, m, S_m) >= 0, not |m|.
    _score: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    _ready: frozenset[Tensor] = frozenset()  # tensors that have the support of the coming step

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
        stochastic_rounding: bool = True,
        foreach: bool | None = None,
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, density_ratio=density_ratio,
            T=T, seed=seed, maximize=maximize, decoupled_weight_decay=decoupled_weight_decay,
            bias_correction=bias_correction, stochastic_rounding=stochastic_rounding,
            foreach=foreach, dense=None,
        )  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the closure's loss, if any."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        self.draw_supports(lambda p: p.grad is not None)
        self._ready = frozenset()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            sparse = [p for p in params if "grad_indices" in self.state[p]]
            for p in sparse:
                self.state[p]["step"] += 1
            for chunk in self._chunks(sparse):
                self._sparse_update(chunk, group)
            self._dense_update([p for p in params if "grad_indices" not in self.state[p]], group)
        return loss

    def draw_supports(self, filter_fn: Callable[..., bool] = lambda p: p.requires_grad) -> None:
        """Draw the supports of the coming step where a window of T steps begins.

        Afterwards `state[p]["grad_indices"]` lists the entries that the coming step reads, for each
        p that `filter_fn` accepts. `step` draws what is missing; what is drawn already stays.
        """
        self._init_seeds(exchange=True)
        generator, ready, first = torch.Generator("cpu"), [], []
        params = [(group, p) for group in self.param_groups for p in group["params"]]
        self._positions = {p: position for position, (_, p) in enumerate(params)}
        for group, p in params:
            if p in self._ready or p.numel() == 0 or not filter_fn(p):
                continue
            state, dense = self.state[p], group["dense"]
            if "step" in state:
                dense = "grad_indices" not in state
            elif dense is None:
                dense = sum(size > 1 for size in p.shape) < 2
            step = int(state.get("step", 0))
            if not dense and step % group["T"] == 0:
                # A draw depends on these only: there is no generator to save, nor one per device.
                generator.manual_seed(_hash(group["seed"], self._positions[p], step))
                k = max(1, int(p.numel() * group["density_ratio"]))
                S_g = draw_support(p.numel(), k, generator).to(p.device, non_blocking=True)
                state["grad_indices"] = S_g
                ready.append(p)
            if "step" not in state:
                _validate_parameter(p)  # again: Accelerate swaps parameters later
                dtype = torch.promote_types(p.dtype, torch.float32)
                state["step"] = torch.zeros((), device="cpu")
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(p if dense else S_g, dtype=dtype)
                if not dense:
                    state["indices"] = S_g.clone()
                    first.append((p, k))
                    if group["bias_correction"] == "entry":
                        state["entry_steps"] = torch.zeros_like(S_g)
        self._ready |= frozenset(ready)
        if len(first) == sum("indices" in state for state in self.state.values()):  # only once
            _warn_if_too_sparse(first)

    def _init_seeds(self, exchange: bool = False) -> None:
        """Draw the seeds not given; in distributed runs only if `exchange`: all ranks take part."""
        distributed = dist.is_available() and dist.is_initialized()
        for group in self.param_groups:
            if group["seed"] is None and (exchange or not distributed):
                seeds = [int(torch.randint(2**62, (), device="cpu"))]
                if distributed:
                    dist.broadcast_object_list(seeds)
                group["seed"] = seeds[0]

    def _chunks(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Group tensors to update at once: of equal dtype, device, mesh, step and kind."""
        kinds = defaultdict(list)
        for p in sorted(params, key=Tensor.numel):  # equal sizes together, for `_topk`
            state, mesh = self.state[p], getattr(p, "device_mesh", None)
            coo = p.grad.is_sparse and (p.grad.sparse_dim(), p.grad._values().shape[1:])
            slots = len(state["indices"]) + len(state["grad_indices"])
            alone = p.is_cpu and 16 * slots >= max(p.numel(), 16 * LARGE) and p  # takes a table
            key = p.dtype, p.device, mesh, int(state["step"]), "entry_steps" in state, coo, alone
            kinds[key].append(p)
        for same in kinds.values():
            limit = CHUNK if same[0].is_cpu else 16 * CHUNK
            ends = accumulate(2 * len(self.state[p]["grad_indices"]) for p in same)
            for _, pairs in groupby(zip(same, ends), key=lambda pair: pair[1] // limit):
                yield [p for p, _ in pairs]

    def _sparse_update(self, params: list[Tensor], group: Group) -> None:
        """Take a step on a chunk of sparse tensors."""
        gradients = self._read_gradients(params, group)
        tensors = [(self.state[p], g, p.numel()) for p, g in zip(params, gradients)]
        if group["foreach"] is False or len(params) == 1:
            updates = [_single_tensor_so(*tensor, group, self._score) for tensor in tensors]
        else:
            updates = _multi_tensor_so(tensors, group, self._score)
        self._add(params, updates, group)

    def _read_gradients(self, params: list[Tensor], group: Group) -> Sequence[Tensor]:
        """Return the g of each tensor at its S_g, (k,) each, weight decay included."""
        supports = [self.state[p]["grad_indices"] for p in params]
        if params[0].grad.is_sparse:
            g = _gather_coo([p.grad for p in params], supports)
        else:
            g = torch.cat([_take(_grad(p), S_g) for p, S_g in zip(params, supports)])
        g = g.to(torch.promote_types(params[0].dtype, torch.float32))
        g = -g if group["maximize"] else g
        if group["weight_decay"] != 0 and not group["decoupled_weight_decay"]:
            W = torch.cat([_take(p, S_g) for p, S_g in zip(params, supports)])
            g = g + group["weight_decay"] * W.to(g.dtype)
        parts = g.split([len(S_g) for S_g in supports])
        if mesh := getattr(params[0], "device_mesh", None):  # g is 0 at entries of other ranks
            dims = {d for p in params for d, c in enumerate(p.placements) if not c.is_replicate()}
            for p, part in zip(params, parts):  # only the first of several replicas contributes
                if any(mesh.get_coordinate()[d] and p.placements[d].is_replicate() for d in dims):
                    part.zero_()
            for d in sorted(dims):
                dist.all_reduce(g, group=mesh.get_group(d))
        return parts

    def _add(self, params: list[Tensor], updates: Iterable[Any], group: Group) -> None:
        """Add updates to W[U] in place, and W's decoupled weight decay.

        Void slots and entries of other ranks add 0. Half precision adds the difference of bits.
        """
        Us, parts, voids = zip(*updates)
        half = torch.finfo(params[0].dtype).bits == 16
        decays = group["weight_decay"] != 0 and group["decoupled_weight_decay"]
        if half or decays:
            before = torch.cat([_take(p, U) for p, U in zip(params, Us)])
            update, sizes = torch.cat(parts), list(map(len, parts))
            if decays:
                decay = group["lr"] * group["weight_decay"] * before.to(update.dtype)
                update -= decay.masked_fill_(torch.cat(voids), 0)
            if half:
                after = self._round(before.to(update.dtype) + update, params, Us, group)
                update = after.view(torch.int16) - before.view(torch.int16)
                update.masked_fill_(torch.cat(voids), 0)  # a nan may come back with other bits
            parts = update.split(sizes)
        for p, U, part in zip(params, Us, parts):
            W, positions, remote = _locate(p, U)
            part = part if remote is None else part.masked_fill(remote, 0)
            W = W.view(torch.int16) if half else W
            W.scatter_add_(0, positions, part.to(W.dtype))

    def _dense_update(self, params: list[Tensor], group: Group) -> None:
        """Update whole tensors, or shards, by torch's own Adam; half precision in float32."""
        states = [self.state[p] for p in params]
        weights = [_local(p).to(torch.promote_types(p.dtype, torch.float32)) for p in params]
        grads = [_local(_grad(p)).to_dense().to(w.dtype) for p, w in zip(params, weights)]
        moments = ([_local(s[name]) for s in states] for name in ("exp_avg", "exp_avg_sq"))
        hyper = {name: group[name] for name in ("lr", "weight_decay", "eps", "maximize", "foreach")}
        hyper |= dict(beta1=group["betas"][0], beta2=group["betas"][1], amsgrad=False)
        update = adamw if group["decoupled_weight_decay"] else adam
        update(weights, grads, *moments, [], [state["step"] for state in states], **hyper)
        for p, weight in zip(params, weights):
            if weight.dtype != p.dtype:
                flat = torch.zeros((), dtype=torch.int64, device=p.device)  # index of each entry
                for size, bounds in zip(p.shape, _shard_ranges(p)):
                    flat = flat[..., None] * size + torch.arange(*bounds, device=p.device)
                rounded = self._round(weight.reshape(-1), [p], [flat.view(-1)], group)
                _local(p).copy_(rounded.view_as(weight))

    def _round(self, x: Tensor, params: list[Tensor], Us: Sequence[Tensor], group: Group) -> Tensor:
        """Round x, new values of the entries U of params, to half precision.

        Stochastic rounding compares the remainder with a hash of seed, position, step and entry,
        which is equal on every device and for every sharding. Its products stay below 2^63.
        """
        nearest = x.to(params[0].dtype)
        if not group["stochastic_rounding"]:
            return nearest
        seed, step = group["seed"], int(self.state[params[0]]["step"])
        keys = [_hash(seed, self._positions[p], step, "rounding") % 2**32 for p in params]
        bits = torch.cat(list(Us))
        for key in (0, keys[0] if len(keys) == 1 else _repeat(keys, list(map(len, Us)), bits)):
            bits = (bits + key) & 0xFFFFFFFF
            bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
            bits = bits ^ (bits >> 15)
        value = nearest.to(x.dtype)
        ulp = torch.where(x.abs() > value.abs(), 1, -1).to(torch.int16)  # away from 0 or to it
        other = (nearest.view(torch.int16) + ulp).view(nearest.dtype)  # x is between the two
        probability = (x - value) / (other.to(x.dtype) - value)  # nan, so never, for inf and nan
        return other.where((bits >> 8) < probability * 2**24, nearest)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; what it does not set is as in the constructor."""
        _validate_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            _validate_parameter(p)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; raise ValueError, and load nothing, if it is unfit."""
        self._ready = frozenset()
        with self.register_load_state_dict_pre_hook(SO._restore_states):  # after the user's hooks
            super().load_state_dict(state_dict)

    def _restore_states(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Key states by parameter: those keyed by number, torch casts to the parameter's dtype."""
        states = {}
        for saved, group in zip(state_dict["param_groups"], self.param_groups):
            _validate_group(saved)
            for number, p in zip(saved["params"], group["params"]):
                if state := state_dict["state"].get(number):
                    states[p] = _restore(p, state)
        return {**state_dict, "state": states}

    def state_dict(self) -> dict[str, Any]:
        """Return settings and state, as torch's optimizers do; `seed` is drawn first."""
        self._init_seeds()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._init_seeds()
        return super().__getstate__()


def _single_tensor_so(
    state: State, g: Tensor, numel: int, group: Group, score: Any, segments: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the step of the module's docstring on one tensor, whose gradient at S_g is g.

    Returns U, what to add to W there, and which of its slots are void, (|S_m| + k,) each. U has a
    slot for each entry of S_m and one for each of S_g: a size that depended on the data would make
    the host wait for the GPU. Of the two slots of an entry of both, the first has its numbers and
    the second is void. The state gets the next S_m, m and v. `segments` is as in `_topk`.
    """
    (beta1, beta2), S_m, S_g = group["betas"], state["indices"], state["grad_indices"]
    U = torch.cat([S_m, S_g])
    m = torch.cat([beta1 * state["exp_avg"], (1 - beta1) * g])
    v = torch.cat([beta2 * state["exp_avg_sq"], (1 - beta2) * g.square()])
    rows = [m, v]
    if "entry_steps" in state:
        rows.append(torch.cat([state["entry_steps"], torch.zeros_like(S_g)]))
    use_table = U.is_cpu and 16 * len(U) >= max(numel, 16 * LARGE) and not segments
    if not use_table:  # sorted, an entry of both has two slots in a row
        U, order = (U.int() if U.is_cpu and numel < 2**31 else U).sort()  # int32 is faster there
        void = torch.zeros_like(U, dtype=torch.bool)
        torch.eq(U[1:], U[:-1], out=void[1:])
        rows = [row.index_select(0, order) for row in rows]
        for row in rows:
            row[:-1].add_(row[1:].where(void[1:], 0))
        U = U.long()
    else:  # at high density, a table of the slot in S_m of each entry of W is faster
        slot = torch.empty(numel, dtype=torch.int32, device="cpu")  # uninitialized outside of S_m
        slot.scatter_(0, S_m, torch.arange(len(S_m), dtype=torch.int32, device="cpu"))
        slot = slot.index_select(0, S_g).clamp_(0, len(S_m) - 1)
        both = (S_m.index_select(0, slot) == S_g).nonzero().view(-1)
        slot, both = slot.index_select(0, both), both + len(S_m)
        for row in rows:
            row.index_add_(0, slot, row.index_select(0, both))
        void = torch.zeros_like(U, dtype=torch.bool).index_fill_(0, both, True)
    m, v, *entry_steps = rows
    t = entry_steps[0].add_(1).to(m.dtype) if entry_steps else state["step"].double()
    bias_correction1 = -torch.expm1(t * math.log(max(beta1, 1e-300))).to(m.dtype)  # 1 - b1^t
    bias_correction2 = -torch.expm1(t * math.log(max(beta2, 1e-300))).to(m.dtype)
    denom = (v / bias_correction2).sqrt_().add_(group["eps"])
    update = (-group["lr"] / bias_correction1 * m).div_(denom).masked_fill_(void, 0)
    importance = m.abs() if score is None else score(U, m, S_m).to(m.dtype).abs()
    integer = torch.int32 if m.dtype == torch.float32 else torch.int64
    bits = importance.masked_fill_(void, -1).view(integer)  # ints order like floats >= 0, faster
    keep = (_topk_by_counting if use_table else _topk)(bits, segments or [(len(U), len(S_g))])
    state["indices"] = U.index_select(0, keep)
    for name, row in zip(("exp_avg", "exp_avg_sq", "entry_steps"), rows):
        state[name] = row.index_select(0, keep)
    return U, update, void


def _topk(score: Tensor, segments: Iterable[tuple[int, int]]) -> Tensor:
    """Positions of the k highest of each `size` scores, for consecutive segments (size, k)."""
    positions, start = [], 0
    for (size, k), same in groupby(segments):
        rows = score[start : start + size * len(list(same))].view(-1, size)
        first = torch.arange(start, start + rows.numel(), size, device=score.device)
        best = rows.topk(k, sorted=False).indices
        positions.append(best.add_(first[:, None]).view(-1))
        start += rows.numel()
    return torch.cat(positions) if len(positions) > 1 else positions[0]


def _topk_by_counting(score: Tensor, segments: Sequence[tuple[int, int]]) -> Tensor:
    """`_topk` of one segment; only scores with the upper 16 bits of the k-th are compared."""
    ((_, k),) = segments
    bucket = (score >> 8 * score.itemsize - 16).clamp_(min=0)  # void slots join the lowest
    at_least = bucket.bincount().flip(0).cumsum(0).flip(0)  # scores in a bucket and above
    last = int((at_least >= k).sum()) - 1  # the bucket of the k-th
    above, some = (bucket > last).nonzero().view(-1), (bucket == last).nonzero().view(-1)
    return torch.cat([above, some[score[some].topk(k - len(above), sorted=False).indices]])


def _multi_tensor_so(tensors: Sequence[Any], group: Group, score: Any) -> Iterable[Any]:
    """Compute the step of `_single_tensor_so` on many tensors, joined to one."""
    states, gradients, numels = zip(*tensors)
    names = [name for name in STATE_NAMES[1:] if name in states[0]]
    joint = states[0] | {name: torch.cat([state[name] for state in states]) for name in names}
    offsets = list(accumulate(numels, initial=0))[:-1]  # where each tensor begins
    ks, ms = ([len(state[name]) for state in states] for name in ("grad_indices", "indices"))
    joint["grad_indices"] += _repeat(offsets, ks, joint["indices"])
    joint["indices"] += _repeat(offsets, ms, joint["indices"])
    g, numel, sizes = torch.cat(gradients), sum(numels), list(map(sum, zip(ms, ks)))
    U, update, void = _single_tensor_so(joint, g, numel, group, score, list(zip(sizes, ks)))
    U = U - _repeat(offsets, sizes, U)
    joint["indices"] -= _repeat(offsets, ks, U)
    for name in names[1:]:  # all but S_g
        parts = [joint[name].new_empty(k) for k in ks]  # a view would keep the joint row alive
        torch.split_with_sizes_copy(joint[name], ks, out=parts)
        for state, part in zip(states, parts):
            state[name] = part
    return zip(U.split(sizes), update.split(sizes), void.split(sizes))


def _repeat(values: list[int], counts: list[int], like: Tensor) -> Tensor:
    """Repeat values[j] counts[j] times without waiting for the device."""
    table = torch.tensor([values, counts], device="cpu").to(like.device, non_blocking=True)
    return table[0].repeat_interleave(table[1], output_size=sum(counts))


def _hash(*key: Any) -> int:
    """64 bits that depend on the key only."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, key)).encode()).digest()[:8], "big")


def draw_support(numel: int, k: int, generator: torch.Generator) -> Tensor:
    """Draw k of numel flat indices, uniformly without replacement: (k,) int64, increasing.

    Duplicates are redrawn until k indices are distinct: by symmetry a uniform subset. It costs
    O(k log k), or O(numel) for a density of 1/32 or more.
    """
    if 32 * k < numel:
        support = torch.empty(0, dtype=torch.int64, device="cpu")
        while len(support) < k:
            more = torch.randint(numel, (k - len(support),), generator=generator, device="cpu")
            support = torch.cat([support, more]).unique()
        return support
    few = min(k, numel - k)  # draw the support or its complement
    mask = torch.zeros(numel, dtype=torch.bool, device="cpu")
    while missing := few - int(mask.count_nonzero()):
        more = torch.randint(numel, (missing,), generator=generator, device="cpu")
        mask.index_fill_(0, more, True)
    return (mask if few == k else ~mask).nonzero().view(-1)


def _take(t: Tensor, flat: Tensor) -> Tensor:
    """Entries of t at flat indices; of a sharded tensor, 0 at those of other ranks."""
    memory, positions, remote = _locate(t, flat)
    entries = memory.index_select(0, positions)
    return entries if remote is None else entries.masked_fill_(remote, 0)


def _locate(t: Tensor, flat: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """A 1-D view of t's memory, positions of flat indices in it, and which are on other ranks."""
    if t.is_contiguous() and not hasattr(t, "device_mesh"):
        return t.view(-1), flat, None
    local = _local(t)
    positions, extent = torch.zeros_like(flat), 1
    remote = torch.zeros_like(flat, dtype=torch.bool)
    for size, (start, stop), stride in list(zip(t.shape, _shard_ranges(t), local.stride()))[::-1]:
        i, flat = flat % size, flat // size
        remote |= (i < start) | (i >= stop)
        positions, extent = positions + (i - start) * stride, extent + (stop - start - 1) * stride
    memory = local.as_strided((extent,), (1,)) if local.numel() else local.new_zeros(1)
    return memory, positions.masked_fill_(remote, 0), remote  # remote ones read and write slot 0


def _gather_coo(grads: list[Tensor], supports: list[Tensor]) -> Tensor:
    """Sparse COO gradients at S_g, (sum of k,); zero where an entry is absent."""
    nnz, ks = [grad._nnz() for grad in grads], [len(S_g) for S_g in supports]
    offsets = list(accumulate((grad.numel() for grad in grads), initial=0))[:-1]
    S_g = torch.cat(supports) + _repeat(offsets, ks, supports[0])
    flat = _repeat(offsets, nnz, S_g)
    for dim, position in enumerate(torch.cat([grad._indices() for grad in grads], dim=1)):
        strides = [grad.shape[dim + 1 :].numel() for grad in grads]
        flat = flat + position * _repeat(strides, nnz, S_g)
    values = torch.cat([grad._values() for grad in grads])  # (nnz, ...): entries, or whole rows
    flat = (flat[:, None] + torch.arange(values.shape[1:].numel(), device=S_g.device)).view(-1)
    slot = torch.searchsorted(S_g, flat).clamp_(max=len(S_g) - 1)
    values = values.reshape(-1).where(S_g[slot] == flat, 0)
    return values.new_zeros(S_g.shape).index_add_(0, slot, values)  # duplicate entries add up


def _local(t: Tensor) -> Tensor:
    """This rank's shard of a DTensor, in its own memory; any other tensor itself."""
    return t.to_local() if hasattr(t, "device_mesh") else t


def _grad(p: Tensor) -> Tensor:
    """The gradient of p, sharded as p is."""
    return p.grad.redistribute(placements=p.placements) if hasattr(p, "device_mesh") else p.grad


def _shard_ranges(t: Tensor) -> list[tuple[int, int]]:
    """The (start, stop) of this rank's shard in each dimension of t."""
    shape, start = t.shape, [0] * t.dim()
    if hasattr(t, "device_mesh"):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as compute

        shape, start = compute(t.shape, t.device_mesh, t.placements)
    return [(first, first + size) for first, size in zip(start, shape)]


def _restore(p: Tensor, saved: State) -> State:
    """Copy p's saved state to p's precision, device and shards; ValueError if it does not fit."""
    state = {k: x.to(p.device, copy=True) if torch.is_tensor(x) else x for k, x in saved.items()}
    if saved.keys().isdisjoint(STATE_NAMES):
        return state  # of other programs only
    dense, moments = "indices" not in saved, ("exp_avg", "exp_avg_sq")
    shape = (p if dense else state["indices"]).shape
    fits = "step" in saved and all(getattr(saved.get(m), "shape", None) == shape for m in moments)
    for S in () if dense else (saved.get("grad_indices"), saved["indices"]):
        fits = fits and S is not None and 0 <= S.min() and S.max() < p.numel()
    if not fits:
        raise ValueError(f"the saved state is not that of a tensor of shape {tuple(p.shape)}")
    state["step"] = torch.tensor(float(saved["step"]), dtype=torch.float32, device="cpu")
    for name in moments:
        value = state[name].to(torch.promote_types(p.dtype, torch.float32))
        value = value.full_tensor() if hasattr(value, "device_mesh") else value
        if dense and hasattr(p, "device_mesh"):
            whole, value = value, torch.zeros_like(p, dtype=value.dtype)
            _local(value).copy_(whole[tuple(slice(*bounds) for bounds in _shard_ranges(p))])
        state[name] = value
    return state


def _warn_if_too_sparse(supports: list[tuple[Tensor, int]]) -> None:
    """Warn of sparse tensors that keep so few entries that they will barely train."""
    few = [str(tuple(p.shape)) for p, k in supports if k < 10 < p.numel()]
    if few:
        frame, level = sys._getframe(), 1  # of the first caller outside of torch and this file
        while frame.f_back and frame.f_code.co_filename.startswith((*torch.__path__, __file__)):
            frame, level = frame.f_back, level + 1
        warnings.warn(
            f"SO keeps fewer than ten entries of {len(few)} of {len(supports)} sparse tensors "
            f"({', '.join(few[:3] + ['...'] * (len(few) > 3))}), which will barely train: raise "
            "density_ratio (and lr), or put them into a group with dense=True, also faster there",
            stacklevel=level,
        )


def _validate_group(group: Group) -> None:
    """Raise ValueError where a setting of a group is out of range."""
    valid = {name: group.get(name, -1) >= 0 for name in ("lr", "eps", "weight_decay")}
    valid["betas"] = len(group.get("betas", ())) == 2 and all(0 <= b < 1 for b in group["betas"])
    valid["density_ratio"] = 0 < group.get("density_ratio", 0) <= 1  # other optimizers have none
    valid["T"] = type(group.get("T")) is int and group["T"] >= 1
    valid["bias_correction"] = group.get("bias_correction") in ("tensor", "entry")
    if wrong := [name for name in valid if not valid[name]]:
        raise ValueError(f"invalid {wrong[0]}: {group.get(wrong[0])!r}")


def _validate_parameter(p: Tensor) -> None:
    """Raise ValueError where SO cannot update a parameter."""
    if p.is_complex() and p.requires_grad:
        problem = "is complex, not real"
    elif getattr(p, "_fsdp_flattened", False):
        problem = "is flattened by FSDP1: use fully_shard (FSDP2) or DistributedDataParallel"
    elif any(placement.is_partial() for placement in getattr(p, "placements", ())):
        problem = "has a Partial placement: redistribute it to Shard or Replicate"
    else:
        return
    raise ValueError(f"a parameter of shape {tuple(p.shape)} {problem}")
