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
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
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
LARGE = 2**15  # slots from which a table and counting are faster than sorting, on CPUs

Group = State = dict[str, Any]
Score = Callable[[Tensor, Tensor, Tensor], Tensor]
Segments = Sequence[tuple[int, int]]


class SO(Optimizer):
    """Adam on a sparse, moving support of each tensor; see the module's docstring.

    The state of a tensor is `step` (t) and, if it is sparse, `grad_indices` (S_g), `indices` (S_m),
    `exp_avg` (m) and `exp_avg_sq` (v), k entries each, the moments in float32 or wider. Sharded
    tensors (DTensor) take the step of the whole tensor: all ranks hold its whole state, one
    all-reduce completes g, and each rank writes its shard.

    Args:
        params: Tensors, or groups as dicts. A group may override any argument below, and set
            `dense`: True for plain Adam, False for SO. By default tensors with two or more
            dimensions larger than 1 are sparse; the rest (biases, norms) are dense.
        lr, betas, eps, maximize: As in Adam.
        weight_decay: L2 penalty as in Adam: it rules the sign of the step where gradients are
            small. AdamW's values need `decoupled_weight_decay`.
        density_ratio: Fraction of entries kept, in (0, 1]; 1 - kappa in the paper.
        T: Steps between two draws of the gradient support.
        seed: Of supports and rounding; by default from torch's global generator (of rank 0) at the
            first draw. A draw also depends on the parameter's position in the optimizer, so
            optimizers of one parameter each need different seeds.
        decoupled_weight_decay: Multiply W at U by 1 - lr * weight_decay instead, as AdamW does.
        bias_correction: "tensor", as in the paper: t counts the tensor's steps. "entry": t counts
            the steps since an entry entered U, so that its first move is lr * sign(g); the state
            then has `entry_steps`, k int64.
        stochastic_rounding: Round weights in half precision up or down at random, right on
            average, so that small steps are not lost. False rounds to the nearest.
        foreach: Update many tensors at once (True, None), or each by `_single_tensor_so` (False).

    Raises:
        ValueError: An argument is out of range, or a parameter is complex or a part of a matrix.
    """

    # Subclasses may select S_m otherwise: by the highest score(U, m, S_m) >= 0 in place of |m|.
    _score: Score | None = None
    # Of the coming step: tensors that have their support, the places of all parameters, and g of
    # sharded tensors. Replaced, never changed in place; copies and pickles begin with these.
    _ready: frozenset[Tensor] = frozenset()
    _positions: dict[Tensor, int] = {}
    _reduced: dict[Tensor, Tensor] = {}

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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.draw_supports(lambda p: p.grad is not None)
        self._ready = frozenset()
        self._reduced = {}
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            if dense := [p for p in params if "grad_indices" not in self.state[p]]:
                self._dense_update(dense, group)
            sparse = [p for p in params if "grad_indices" in self.state[p]]
            for p in sparse:
                self.state[p]["step"] += 1
            for chunk in self._chunks(sparse):
                self._sparse_update(chunk, group)
        return loss

    def _chunks(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Sort tensors into lists to update at once: of one dtype, device, step and kind."""
        kinds = defaultdict(list)
        for p in sorted(params, key=Tensor.numel):  # equal sizes together, for `_topk`
            state, kind = self.state[p], hasattr(p, "device_mesh")
            k = len(state["grad_indices"])
            if p.is_cpu and 2 * k >= LARGE and 32 * k >= p.numel():
                yield [p]  # whose union takes a table
                continue
            if p.grad.layout == torch.sparse_coo:
                kind = p.grad.sparse_dim(), p.grad._values().shape[1:]
            kinds[p.dtype, p.device, int(state["step"]), "entry_steps" in state, kind].append(p)
        for same in kinds.values():
            limit = CHUNK if same[0].is_cpu else 16 * CHUNK
            slots = accumulate(2 * len(self.state[p]["grad_indices"]) for p in same)
            for _, pairs in groupby(zip(same, slots), key=lambda pair: pair[1] // limit):
                yield [p for p, _ in pairs]

    def _sparse_update(self, params: list[Tensor], group: Group) -> None:
        """Take a step on a chunk of sparse tensors."""
        states, numels = [self.state[p] for p in params], [p.numel() for p in params]
        if hasattr(params[0], "device_mesh"):
            self._reduced = self._reduced or self._reduce_shards()
            gradients = [self._reduced[p] for p in params]
        else:
            gradients = self._read_gradients(params, group)
        if group["foreach"] is False or len(params) == 1:
            updates = [
                _single_tensor_so(state, g, group, self._score, numel)
                for state, g, numel in zip(states, gradients, numels)
            ]
        else:
            updates = _multi_tensor_so(states, numels, gradients, group, self._score)
        self._add(params, updates, group)

    def _dense_update(self, params: list[Tensor], group: Group) -> None:
        """Update whole tensors, or shards, by torch's own Adam; half precision in float32."""
        for p in params:
            if "step" not in self.state[p]:
                _init_state(self.state[p], p, p)
        states = [self.state[p] for p in params]
        weights = [_local(p).to(torch.promote_types(p.dtype, torch.float32)) for p in params]
        grads = [_local(_grad(p)) for p in params]
        grads = [grad.to_dense() if grad.is_sparse else grad for grad in grads]
        grads = [grad.to(weight.dtype) for grad, weight in zip(grads, weights)]
        for state, weight in zip(states, weights):  # whose precision may have changed
            state.update({name: state[name].to(weight.dtype) for name in ("exp_avg", "exp_avg_sq")})
        moments = ([_local(s[name]) for s in states] for name in ("exp_avg", "exp_avg_sq"))
        steps = [state["step"] for state in states]
        hyper = {name: group[name] for name in ("lr", "weight_decay", "eps", "maximize", "foreach")}
        hyper.update(zip(("beta1", "beta2"), group["betas"]), amsgrad=False)
        update = adamw if group["decoupled_weight_decay"] else adam
        update(weights, grads, *moments, [], steps, **hyper)
        for p, weight in zip(params, weights):
            if torch.finfo(p.dtype).bits == 16:
                flat = torch.zeros((), dtype=torch.int64, device=p.device)  # index of each entry
                for size, box in zip(p.shape, _shard_box(p)):
                    flat = flat[..., None] * size + torch.arange(*box, device=p.device)
                rounded = self._round(weight.view(-1), [p], [flat.view(-1)], group)
                _local(p).copy_(rounded.view_as(weight))

    @torch.no_grad()
    def draw_supports(self, filter_fn: Callable[[Tensor], bool] | None = None) -> None:
        """Draw the supports of the coming step where a window of T steps begins.

        Afterwards `state[p]["grad_indices"]` lists the entries that the coming step reads. Calling
        this is optional and, until that step, repeatable: `step` draws what nobody has drawn.

        Args:
            filter_fn: Tells which tensors will take part; those that require a gradient by default.
        """
        if any(group["seed"] is None for group in self.param_groups):
            self._init_seeds(exchange=True)
        generator = torch.Generator("cpu")
        params = [(group, p) for group in self.param_groups for p in group["params"]]
        self._positions = {p: position for position, (_, p) in enumerate(params)}
        first, ready = [], set()
        for group, p in params:
            skip = not (filter_fn(p) if filter_fn else p.requires_grad)
            if skip or p.numel() == 0 or p in self._ready:
                continue
            state, dense = self.state[p], group["dense"]
            if "step" in state:
                dense = "grad_indices" not in state
            elif dense is None:
                dense = sum(size > 1 for size in p.shape) < 2
            step = int(state.get("step", 0))
            if dense or step % group["T"]:
                continue
            # A draw depends on seed, position and step only: there is no generator to save, the
            # other tensors do not matter, and it is the same on every device.
            generator.manual_seed(_hash(group["seed"], self._positions[p], step))
            k = max(1, int(p.numel() * group["density_ratio"]))
            S_g = draw_support(p.numel(), k, generator).to(p.device, non_blocking=True)
            if "step" not in state:
                _init_state(state, p, S_g)
                state["indices"] = S_g.clone()
                if group["bias_correction"] == "entry":
                    state["entry_steps"] = torch.zeros_like(S_g)
                first.append((p, k))
            state["grad_indices"] = S_g
            ready.add(p)
        self._ready |= ready
        if len(first) == sum("indices" in state for state in self.state.values()):  # only once
            _warn_if_too_sparse(first)

    def _init_seeds(self, exchange: bool = False) -> None:
        """Draw the seeds that were not given; several processes do so once they can `exchange`."""
        distributed = dist.is_available() and dist.is_initialized()
        for group in self.param_groups:
            if group["seed"] is None and (exchange or not distributed):
                seeds = [int(torch.randint(2**62, (), device="cpu"))]
                if distributed:
                    dist.broadcast_object_list(seeds)
                group["seed"] = seeds[0]

    # Where gradients are read and weights are written

    def _read_gradients(self, params: list[Tensor], group: Group) -> Sequence[Tensor]:
        """The g of the module's docstring of each tensor, (k,)."""
        supports = [self.state[p]["grad_indices"] for p in params]
        if params[0].grad.layout == torch.sparse_coo:
            g = _gather_coo([p.grad for p in params], supports)
        else:
            g = torch.cat([_take(_grad(p), S_g) for p, S_g in zip(params, supports)])
        g = g.to(torch.promote_types(params[0].dtype, torch.float32))
        g = -g if group["maximize"] else g
        if group["weight_decay"] != 0 and not group["decoupled_weight_decay"]:
            W = torch.cat([_take(p, S_g) for p, S_g in zip(params, supports)])
            g = g + group["weight_decay"] * W.to(g.dtype)
        return g.split([len(S_g) for S_g in supports])

    def _reduce_shards(self) -> dict[Tensor, Tensor]:
        """The g of all sharded tensors, by one all-reduce of their k values over a mesh."""
        rows = defaultdict(list)
        for group in self.param_groups:
            for p in group["params"]:
                sparse = p.grad is not None and "grad_indices" in self.state[p]
                if sparse and hasattr(p, "device_mesh"):
                    rows[p.device_mesh].append((p, *self._read_gradients([p], group)))
        reduced = {}
        for mesh, row in rows.items():
            params, parts = zip(*row)
            dims = {d for p in params for d, cut in enumerate(p.placements) if hasattr(cut, "dim")}
            for p, g in row:  # zero at entries of other ranks; of replicas, the first contributes
                if any(mesh.get_coordinate()[d] for d in dims if p.placements[d].is_replicate()):
                    g.zero_()
            total = torch.cat(parts)
            for d in sorted(dims):
                dist.all_reduce(total, group=mesh.get_group(d))
            reduced.update(zip(params, total.split(list(map(len, parts)))))
        return reduced

    def _add(
        self, params: list[Tensor], updates: Iterable[tuple[Tensor, Tensor, Tensor]], group: Group
    ) -> None:
        """Add updates to W[U] in each p's own memory; decoupled weight decay comes first.

        What is added in void slots, and to entries of other ranks, is 0. In half precision integers
        are added: the difference of the bits before and after.
        """
        Us, parts, voids = zip(*updates)
        half = torch.finfo(params[0].dtype).bits == 16
        decays = group["weight_decay"] != 0 and group["decoupled_weight_decay"]
        if half or decays:
            before = torch.cat([_take(p, U) for p, U in zip(params, Us)])
            update, sizes = torch.cat(parts), list(map(len, parts))
            if decays:
                decay = group["lr"] * group["weight_decay"] * before.to(update.dtype)
                update = update - decay.masked_fill_(torch.cat(voids), 0)
            if half:
                after = self._round(before.to(update.dtype) + update, params, Us, group)
                update = after.view(torch.int16) - before.view(torch.int16)
            parts = update.split(sizes)
        for p, U, part in zip(params, Us, parts):
            W, at, outside = _locate(p, U)
            part = part if outside is None else part.masked_fill(outside, 0)
            W = W.view(torch.int16) if half else W
            W.scatter_add_(0, at, part.to(W.dtype))

    def _round(
        self, x: Tensor, params: list[Tensor], entries: Sequence[Tensor], group: Group
    ) -> Tensor:
        """Round x, at flat entries of tensors, to half precision: to the nearest, or at random.

        Then the neighbor farther from x is taken with the probability of the remainder. The bits
        are a hash of the entry's number with seed, position and step: they are equal on every
        device and for every sharding. Products stay below 2^63.
        """
        near = x.to(params[0].dtype)
        if not group["stochastic_rounding"]:
            return near
        places = [(self._positions[p], int(self.state[p]["step"])) for p in params]
        keys = [_hash(group["seed"], *place, "rounding") % 2**32 for place in places]
        flat = torch.cat(list(entries))
        for word in (0, _repeat(keys, list(map(len, entries)), flat)):
            flat = (flat + word) & 0xFFFFFFFF
            flat = ((flat ^ (flat >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
            flat = flat ^ (flat >> 15)
        value = near.to(x.dtype)
        away = torch.where(x.abs() > value.abs(), 1, -1).to(torch.int16)  # as integers
        far = (near.view(torch.int16) + away).view(near.dtype)
        chance = (x - value) / (far.to(x.dtype) - value)  # never where it is nan: of inf and nan
        return far.where((flat >> 8) < chance * 2**24, near)

    # What torch.optim asks of an optimizer: groups, state dicts, pickles

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; what it does not set is as in the constructor."""
        super().add_param_group(param_group)
        try:
            _validate_group(self.param_groups[-1])
            for p in self.param_groups[-1]["params"]:
                _validate_parameter(p)
        except ValueError:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return settings and state, as torch's optimizers do.

        `seed` is None in it only where several processes have not exchanged it yet.
        """
        self._init_seeds()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, also where the parameters had another precision.

        What other programs keep in `state[p]` comes back as it was saved.

        Raises:
            ValueError: It is not the state of an SO of such tensors; nothing is loaded then.
        """
        states = {}

        def take_states(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            for saved_group, group in zip(saved["param_groups"], self.param_groups):
                _validate_group(saved_group)
                for number, p in zip(saved_group["params"], group["params"]):
                    if state := saved["state"].get(number):
                        states[p] = _restore(p, state)
            return {**saved, "state": {}}  # torch would cast it to the dtypes of the parameters

        def give_states(_: Optimizer) -> None:
            self.state.update(states)
            self._ready = frozenset()

        hooks = [  # those of others see what is loaded, before and after
            self.register_load_state_dict_pre_hook(take_states),
            self.register_load_state_dict_post_hook(give_states, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        except KeyError as error:
            raise ValueError(f"this is not a state dict of SO: it lacks {error}") from error
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._init_seeds()
        return super().__getstate__()


# One step of one tensor, and the same of many tensors at once


def _single_tensor_so(
    state: State, g: Tensor, group: Group, score: Score | None, numel: int, segments: Segments = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the step of the module's docstring on one tensor, whose gradient at S_g is g.

    The union has one slot for each entry of S_m and one for each of S_g, so that its size does not
    depend on the data: on a GPU the host would have to wait for it. Of the two slots of an entry of
    both, the first one has its numbers, and the second one is void.

    The state gets the next S_m, m and v. `step` has counted t, and `SO._add` writes W.

    Returns:
        U, what to add to W there, and which of its slots are void, (|S_m| + k,) each.
    """
    (beta1, beta2), t = group["betas"], state["step"].item()
    S_m, S_g = state["indices"], state["grad_indices"]
    pairs = [
        (beta1 * state["exp_avg"], (1 - beta1) * g),
        (beta2 * state["exp_avg_sq"], (1 - beta2) * g.square()),
    ]
    if "entry_steps" in state:
        pairs.append((state["entry_steps"], torch.zeros_like(S_g)))
    U, rows = torch.cat([S_m, S_g]), [torch.cat(pair) for pair in pairs]
    if U.is_cpu and len(U) >= LARGE and 16 * len(U) >= numel and not segments:
        void = _unite_by_table(S_m, S_g, rows, numel)
    else:  # sorted, an entry of both stands twice in a row: the first gets the numbers of both
        if U.is_cpu and numel < 2**31:
            U = U.int()  # is sorted in half the time
        U, order = U.sort()
        void = torch.zeros_like(U, dtype=torch.bool)
        torch.eq(U[1:], U[:-1], out=void[1:])
        rows = [row.index_select(0, order) for row in rows]
        for row in rows:
            row[:-1].add_(row[1:].where(void[1:], 0))
        U = U.long()
    m, v = rows[:2]
    bias_corrections = torch.tensor([1 - beta1**t, 1 - beta2**t], dtype=m.dtype, device="cpu")
    if "entry_steps" in state:
        t = rows[2].add_(1).to(m.dtype)  # of each entry; 1 - b^t without cancellation
        bias_corrections = [-torch.expm1(t * math.log(max(b, 1e-300))) for b in (beta1, beta2)]
    bias_correction1, bias_correction2 = bias_corrections
    denom = (v / bias_correction2).sqrt_().add_(group["eps"])
    update = (-group["lr"] / bias_correction1 * m).div_(denom).masked_fill_(void, 0)
    importance = m.abs() if score is None else score(U, m, S_m)
    keep = _topk(importance.masked_fill_(void, -1), segments or [(len(U), len(S_g))])
    state["indices"] = U.index_select(0, keep)
    state["exp_avg"], state["exp_avg_sq"] = m.index_select(0, keep), v.index_select(0, keep)
    if "entry_steps" in state:
        state["entry_steps"] = rows[2].index_select(0, keep)
    return U, update, void


def _unite_by_table(S_m: Tensor, S_g: Tensor, rows: list[Tensor], numel: int) -> Tensor:
    """Add numbers at S_g to those at S_m in each row, with a table of the tensor's size.

    Returns which slots are void: those of S_g where S_m has the entry.
    """
    table = torch.empty(numel, dtype=torch.int32, device="cpu")  # right at S_m, garbage elsewhere
    table.scatter_(0, S_m, torch.arange(len(S_m), dtype=torch.int32, device="cpu"))
    slot = table.index_select(0, S_g).clamp_(0, len(S_m) - 1)
    both = (S_m.index_select(0, slot) == S_g).nonzero().view(-1)
    slot, void = slot.index_select(0, both), both + len(S_m)
    for row in rows:
        row.index_add_(0, slot, row.index_select(0, void))
    return torch.zeros_like(rows[0], dtype=torch.bool).index_fill_(0, void, True)


def _topk(score: Tensor, segments: Segments) -> Tensor:
    """Positions of the k highest scores in each (size, k) of the segments of a row."""
    positions, start = [], 0
    for (size, k), same in groupby(segments):
        rows = score[start : start + size * len(list(same))].view(-1, size)
        if size < LARGE or score.dtype != torch.float32 or not score.is_cpu:
            first = torch.arange(start, start + rows.numel(), size, device=score.device)
            best = rows.topk(k, sorted=False).indices
            positions.append(best.add_(first[:, None]).view(-1))
        else:
            for number, row in enumerate(rows):
                positions.append(_topk_by_counting(row, k).add_(start + number * size))
        start += rows.numel()
    return torch.cat(positions) if len(positions) > 1 else positions[0]


def _topk_by_counting(score: Tensor, k: int) -> Tensor:
    """Positions of the k highest scores; only those that share the k-th's upper 16 bits are sorted.

    Float32 numbers that are not negative have the order of their bits; void slots have -1.
    """
    bucket = (score.view(torch.int32) >> 16).add_(1).clamp_(min=0)
    at_least = bucket.bincount(minlength=2**15 + 2).flip(0).cumsum(0).flip(0)
    last = int((at_least >= k).sum()) - 1  # the bucket of the k-th
    keep = bucket > last
    some = (bucket == last).nonzero().view(-1)
    more = score[some].topk(k - int(at_least[last + 1]), sorted=False).indices
    return keep.index_fill_(0, some[more], True).nonzero().view(-1)


def _multi_tensor_so(
    states: list[State],
    numels: list[int],
    gradients: Sequence[Tensor],
    group: Group,
    score: Score | None,
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Compute the step of `_single_tensor_so` on many tensors at once, as if they were one.

    Entry i of tensor j is entry i + offsets[j] of the joint tensor.
    """
    names = [name for name in STATE_NAMES[1:] if name in states[0]]
    joint = {name: torch.cat([state[name] for state in states]) for name in names}
    joint["step"] = states[0]["step"]
    offsets, counts = list(accumulate(numels, initial=0))[:-1], []
    for name in ("grad_indices", "indices"):
        counts.append([len(state[name]) for state in states])
        joint[name] = joint[name] + _repeat(offsets, counts[-1], joint[name])
    ks, sizes = counts[0], list(map(sum, zip(*counts)))
    segments = list(zip(sizes, ks))
    g, numel = torch.cat(gradients), sum(numels)
    U, update, void = _single_tensor_so(joint, g, group, score, numel, segments)
    U = U - _repeat(offsets, sizes, U)
    joint["indices"] = joint["indices"] - _repeat(offsets, ks, U)
    for name in names[1:]:  # all but S_g
        parts = [joint[name].new_empty(k) for k in ks]  # a view would keep the joint row alive
        torch.split_with_sizes_copy(joint[name], ks, out=parts)
        for state, part in zip(states, parts):
            state[name] = part
    return zip(U.split(sizes), update.split(sizes), void.split(sizes))


def _repeat(values: list[int], counts: list[int], like: Tensor) -> Tensor:
    """Repeat values[j] counts[j] times without waiting for the device; a single value once."""
    row, times = (torch.tensor(x, device="cpu") for x in (values, counts))
    row, times = (x.to(like.device, non_blocking=True) for x in (row, times))
    return row.repeat_interleave(times, output_size=sum(counts)) if len(values) > 1 else row


# Draws, and entries read


def _hash(*key: Any) -> int:
    """64 bits that depend on the key only."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, key)).encode()).digest()[:8], "big")


def draw_support(numel: int, k: int, generator: torch.Generator) -> Tensor:
    """Draw k of numel flat indices, uniformly without replacement: (k,) int64, increasing.

    Repeats are drawn again until k distinct indices are left, which by symmetry is a uniform
    subset; it costs O(k log k), or O(numel) for a density of 1/32 or more.
    """
    if 32 * k < numel:
        support = torch.empty(0, dtype=torch.int64, device="cpu")
        while len(support) < k:
            more = torch.randint(numel, (k - len(support),), generator=generator, device="cpu")
            support = torch.cat([support, more]).unique()
        return support
    few = min(k, numel - k)  # or draw those that are left out
    mask = torch.zeros(numel, dtype=torch.bool, device="cpu")
    while missing := few - int(mask.count_nonzero()):
        more = torch.randint(numel, (missing,), generator=generator, device="cpu")
        mask.index_fill_(0, more, True)
    return (mask if few == k else ~mask).nonzero().view(-1)


def _take(t: Tensor, flat: Tensor) -> Tensor:
    """Entries of t at flat indices; of a sharded tensor, 0 at those of other ranks."""
    memory, at, outside = _locate(t, flat)
    entries = memory.index_select(0, at)
    return entries if outside is None else entries.masked_fill_(outside, 0)


def _locate(t: Tensor, flat: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The memory of t, where in it flat entries are, and which of them other ranks have (at 0)."""
    if t.is_contiguous() and not hasattr(t, "device_mesh"):
        return t.view(-1), flat, None
    local = _local(t)
    at, extent = torch.zeros_like(flat), 1
    outside = torch.zeros_like(flat, dtype=torch.bool)
    for size, (first, end), stride in list(zip(t.shape, _shard_box(t), local.stride()))[::-1]:
        i, flat = flat % size, flat // size
        outside |= (i < first) | (i >= end)
        at, extent = at + (i - first) * stride, extent + (end - first - 1) * stride
    memory = local.as_strided((extent,), (1,)) if local.numel() else local.new_zeros(1)
    return memory, at.masked_fill_(outside, 0), outside


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
    row = torch.arange(values.shape[1:].numel(), device=S_g.device)
    flat = (flat[:, None] + row).view(-1)
    slot = torch.searchsorted(S_g, flat).clamp_(max=len(S_g) - 1)
    found = values.reshape(-1).where(S_g[slot] == flat, 0)
    return found.new_zeros(S_g.shape).index_add_(0, slot, found)  # repeated entries add up


# Shards: DTensors, of which each rank has a part


def _local(t: Tensor) -> Tensor:
    """This rank's shard of a DTensor, in its own memory; any other tensor itself."""
    return t.to_local() if hasattr(t, "device_mesh") else t


def _grad(p: Tensor) -> Tensor:
    """The gradient of p, sharded as p is."""
    return p.grad.redistribute(placements=p.placements) if hasattr(p, "device_mesh") else p.grad


def _shard_box(t: Tensor) -> list[tuple[int, int]]:
    """First and last + 1 index in each dimension of this rank's shard."""
    shape, start = t.shape, [0] * t.dim()
    if hasattr(t, "device_mesh"):
        from torch.distributed.tensor import _utils

        compute = _utils.compute_local_shape_and_global_offset
        shape, start = compute(t.shape, t.device_mesh, t.placements)
    return [(first, first + size) for first, size in zip(start, shape)]


# Checks, warnings and states


def _init_state(state: State, p: Tensor, like: Tensor) -> None:
    """Begin p's state, with moments of the shape of `like`."""
    _validate_parameter(p)  # again: Accelerate replaces those of the constructor
    zeros = torch.zeros_like(like, dtype=torch.promote_types(p.dtype, torch.float32))
    state.update(step=torch.zeros((), device="cpu"), exp_avg=zeros, exp_avg_sq=zeros.clone())


def _warn_if_too_sparse(supports: list[tuple[Tensor, int]]) -> None:
    """Warn of sparse tensors that keep so few entries that they will barely train."""
    few = [str(tuple(p.shape)) for p, k in supports if k < 10 < p.numel()]
    if few:
        level = 1  # points past torch's frames and this file's to the program that called
        while sys._getframe(level).f_code.co_filename.startswith((*torch.__path__, __file__)):
            level += 1
        warnings.warn(
            f"SO keeps fewer than ten entries of {len(few)} of {len(supports)} sparse tensors "
            f"({', '.join(few[:3] + ['...'] * (len(few) > 3))}), which will barely train: raise "
            "density_ratio (and lr), or put them into a group with dense=True, also faster there",
            stacklevel=level + 1,
        )


def _restore(p: Tensor, saved: State) -> State:
    """A copy of p's saved state in p's precision and place; raise ValueError if it is not p's."""
    state, dense = {}, saved.keys().isdisjoint(("grad_indices", "indices"))
    for name, value in saved.items():
        if name == "step":  # a plain number in some files
            value = torch.tensor(float(value), dtype=torch.float32, device="cpu")
        elif name in ("exp_avg", "exp_avg_sq"):
            value = value.full_tensor() if hasattr(value, "device_mesh") else value
            if dense and hasattr(p, "device_mesh"):
                whole, value = value, torch.zeros_like(p, dtype=value.dtype)
                _local(value).copy_(whole[tuple(slice(*box) for box in _shard_box(p))])
            dtype = torch.promote_types(p.dtype, torch.float32)
            value = value.to(p.device, dtype, copy=True)
        elif isinstance(value, Tensor):
            value = value.to(p.device, copy=True)
        state[name] = value if isinstance(value, Tensor) else deepcopy(value)
    if saved.keys().isdisjoint(STATE_NAMES):
        return state  # of other programs only
    supports = () if dense else ("grad_indices", "indices")
    good = saved.keys() >= {"step", "exp_avg", "exp_avg_sq", *supports}
    good = good and 0 <= state["step"] < math.inf
    for name in supports if good else ():
        S = state[name]  # where a step writes
        good &= S.dtype == torch.int64 and S.dim() == 1 and 0 < len(S) == len(S.unique())
        good = good and 0 <= S.min() and S.max() < p.numel()
    for name in {"exp_avg", "exp_avg_sq", "entry_steps"} & saved.keys() if good else ():
        good &= state[name].shape == (p if dense else state["indices"]).shape
    if not good:
        raise ValueError(f"the saved state is not that of a tensor of shape {tuple(p.shape)}")
    return state


def _validate_group(group: Group) -> None:
    """Raise ValueError where a setting of a group is out of range."""
    betas, T = group["betas"], group["T"]
    valid = {name: group[name] >= 0 for name in ("lr", "eps", "weight_decay")}
    valid["betas"] = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    valid["density_ratio"] = 0 < group["density_ratio"] <= 1
    valid["T"] = type(T) is int and T >= 1
    valid["bias_correction"] = group["bias_correction"] in ("tensor", "entry")
    for name, is_valid in valid.items():
        if not is_valid:
            raise ValueError(f"invalid {name}: {group[name]!r}")


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
