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

import difflib
import hashlib
import math
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from functools import partial
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
FLAGS = ("maximize", "decoupled_weight_decay", "stochastic_rounding")
# Of settings that states of version 1.0 do not have.
DEFAULTS_SINCE_1_0 = dict(zip(FLAGS, (False, False, True)), bias_correction="tensor", foreach=None)
CHUNK = 2**18  # slots updated at once: what a core's cache holds; on GPUs 16 times as many
LARGE = 2**15  # slots from which `_unite_large` and counting in place of a sort are faster

Group = State = "dict[str, Any]"
Score = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        lr, betas, eps: As in Adam.
        weight_decay: L2 penalty as in Adam: it rules the sign of the step where gradients are
            small. AdamW's values need `decoupled_weight_decay`.
        density_ratio: Fraction of entries kept, in (0, 1]; 1 - kappa in the paper.
        T: Steps between two draws of the gradient support.
        seed: Seed of the supports and of rounding. None takes one from torch's global generator at
            the first draw, on all ranks that of rank 0. A draw also depends on the parameter's
            position in the optimizer, so optimizers of one parameter each need different seeds.
        maximize: Ascend instead of descend.
        decoupled_weight_decay: Multiply W at U by 1 - lr * weight_decay before the step, as AdamW
            does with all of W, and leave g alone.
        bias_correction: "tensor", as in the paper: t counts the tensor's steps. "entry": t counts
            the steps since an entry entered U, so that its first move is lr * sign(g); the state
            then has `entry_steps`, k int64.
        stochastic_rounding: Round weights in half precision up or down at random, right on
            average, so that small steps are not lost. False rounds to the nearest.
        foreach: Update many tensors at once (True, None), or each by the plain function that comes
            first below (False). Results agree to rounding.

    Raises:
        ValueError: An argument is out of range, or a parameter is complex or a part of a matrix.
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
        stochastic_rounding: bool = True,
        foreach: bool | None = None,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, T=T, seed=seed)
        defaults.update(zip(FLAGS, (maximize, decoupled_weight_decay, stochastic_rounding)))
        defaults.update(density_ratio=density_ratio, bias_correction=bias_correction)
        self._init_caches()
        super().__init__(params, dict(defaults, foreach=foreach, dense=None))

    def _init_caches(self) -> None:
        self._ready: set[Tensor] = set()  # tensors that have their support for the coming step
        self._local_seeds: list[dict] = []  # groups with a seed that other ranks do not know
        self._positions: dict[Tensor, int] = {}  # places among all parameters
        self._reduced: dict[Tensor, Tensor] = {}  # g of sharded tensors in this step
        self._kinds: dict[Tensor, tuple] = {}  # shape and dtype at the last step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.draw_supports(lambda p: p.grad is not None)
        self._ready.clear()
        self._reduced = self._reduce_shards()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            if dense := [p for p in params if _is_dense(p, group)]:
                self._dense_update(dense, group)
            sparse = [p for p in params if not _is_dense(p, group)]
            for p in sparse:
                self.state[p]["step"] += 1
            for chunk in self._chunks(sparse):
                self._sparse_update(chunk, group)
        self._reduced = {}
        return loss

    def _sparse_update(self, params: list[Tensor], group: Group) -> None:
        """Take a step on a chunk of sparse tensors."""
        states, numels = [self.state[p] for p in params], [p.numel() for p in params]
        gradients = self._read_gradients(params, group)
        large = _is_large(params[0], states[0])
        if group["foreach"] is False or large:
            updates = []
            for state, g, numel in zip(states, gradients, numels):
                unite = partial(_unite_large, numel) if large else _unite
                updates.append(_single_tensor_so(state, g, group, self._score, unite, _topk))
        else:
            updates = _multi_tensor_so(states, numels, gradients, group, self._score)
        self._add(params, updates, group)

    def _score(self, U: Tensor, m: Tensor, S_m: Tensor) -> Tensor:
        """Importance of the union's slots, 0 or more; the k highest are the next S_m."""
        return m.abs()

    def _dense_update(self, params: list[Tensor], group: Group) -> None:
        """Update whole tensors, or shards, by torch's own Adam; half precision in float32."""
        for p in params:
            if "step" not in self.state[p]:
                zeros = torch.zeros_like(p, dtype=_moment_dtype(p))
                step = torch.zeros((), device="cpu")
                self.state[p].update(step=step, exp_avg=zeros, exp_avg_sq=zeros.clone())
        states = [self.state[p] for p in params]
        weights = [_local(p).to(_moment_dtype(p)) for p in params]
        grads = [_local(_grad(p)) for p in params]
        grads = [grad.to_dense() if grad.is_sparse else grad for grad in grads]
        grads = [grad.to(weight.dtype) for grad, weight in zip(grads, weights)]
        moments = ([_local(s[name]) for s in states] for name in ("exp_avg", "exp_avg_sq"))
        hyper = {name: group[name] for name in ("lr", "weight_decay", "eps", "maximize", "foreach")}
        hyper.update(zip(("beta1", "beta2"), group["betas"]), amsgrad=False)
        update = adamw if group["decoupled_weight_decay"] else adam
        update(weights, grads, *moments, [], [state["step"] for state in states], **hyper)
        for p, weight in zip(params, weights):
            if weight.dtype != p.dtype:
                _local(p).copy_(self._round(weight, [p], [_flat_indices(p)], group))

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
        draws = defaultdict(list)  # by device
        every = [(group, p) for group in self.param_groups for p in group["params"]]
        self._positions = {p: position for position, (_, p) in enumerate(every)}
        for group, p in every:
            skip = not (filter_fn(p) if filter_fn else p.requires_grad)
            if skip or p.numel() == 0 or p in self._ready:
                continue
            if self._kinds.get(p) != (p.shape, p.dtype):
                self._fit_state(p)
            state = self.state.get(p, {})
            step = int(state.get("step", 0))
            if _is_dense(p, group) or ("step" in state and step % group["T"]):
                continue
            # A draw depends on seed, position and step only: there is no generator to save, the
            # other tensors do not matter, and it is the same on every device.
            generator.manual_seed(_hash(group["seed"], self._positions[p], step))
            k = max(1, int(p.numel() * group["density_ratio"]))
            draws[p.device].append((p, group, draw_support(p.numel(), k, generator)))
            self._ready.add(p)
        if not any("grad_indices" in state for state in self.state.values()):
            _warn_if_too_sparse([(p, len(S_g)) for row in draws.values() for p, _, S_g in row])
        for device, row in draws.items():  # one copy to each device, which waits for nothing
            params, groups, supports = zip(*row)
            row, ks = torch.cat(supports).to(device, non_blocking=True), list(map(len, supports))
            for p, group, S_g in zip(params, groups, _split_copy(row, ks)):
                state = self.state[p]
                if "step" not in state:
                    zeros = torch.zeros(S_g.shape, dtype=_moment_dtype(p), device=device)
                    state.update(step=torch.zeros((), device="cpu"), indices=S_g.clone())
                    state.update(exp_avg=zeros, exp_avg_sq=zeros.clone())
                    if group["bias_correction"] == "entry":
                        state["entry_steps"] = torch.zeros_like(S_g)
                state["grad_indices"] = S_g

    def _fit_state(self, p: Tensor) -> None:
        """Fit p's state to its shape and dtype, which are not those of the last step."""
        shape, _ = self._kinds.get(p, (p.shape, p.dtype))
        state = self.state.get(p, {})
        _validate_parameter(p)
        if shape != p.shape:
            change = f"a parameter of shape {tuple(shape)} now has shape {tuple(p.shape)}"
            _warn(f"{change}: its supports and moments start anew")
            self.state[p] = {name: state[name] for name in state.keys() - set(STATE_NAMES)}
        else:
            for name in {"exp_avg", "exp_avg_sq"} & state.keys():
                state[name] = state[name].to(_moment_dtype(p))
        self._kinds[p] = p.shape, p.dtype

    def _init_seeds(self, broadcast: bool = False) -> None:
        """Draw the seeds that were not given; with `broadcast`, take those of rank 0."""
        for group in self.param_groups:
            if group["seed"] is None:
                group["seed"] = int(torch.randint(2**62, (), device="cpu"))
                self._local_seeds.append(group)
        if broadcast and self._local_seeds and dist.is_available() and dist.is_initialized():
            seed = _broadcast_seed(self._local_seeds[0]["seed"], len(self._local_seeds))
            for number, group in enumerate(self._local_seeds):
                group["seed"] = _hash(seed, number) >> 2  # fits int64
            self._local_seeds.clear()

    # Where gradients are read and weights are written

    def _chunks(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Sort tensors into lists to update at once, of one dtype, device and kind of gradient."""
        kinds = defaultdict(list)
        for p in sorted(params, key=Tensor.numel):  # equal sizes together, for `_segment_topk`
            state, kind = self.state[p], _is_sharded(p)
            if p.grad.layout == torch.sparse_coo:
                kind = p.grad.sparse_dim(), p.grad._values().shape[1:]
            key = p.dtype, p.device, kind, "entry_steps" in state, _is_large(p, state)
            kinds[key].append(p)
        for same in kinds.values():
            limit = CHUNK if same[0].is_cpu else 16 * CHUNK
            slots = accumulate(2 * len(self.state[p]["grad_indices"]) for p in same)
            for _, pairs in groupby(zip(same, slots), key=lambda pair: pair[1] // limit):
                yield [p for p, _ in pairs]

    def _read_gradients(self, params: list[Tensor], group: Group) -> list[Tensor]:
        """The g of the module's docstring of each tensor, (k,)."""
        if params[0] in self._reduced:
            return [self._reduced[p] for p in params]
        supports = [self.state[p]["grad_indices"] for p in params]
        if params[0].grad.layout == torch.sparse_coo:
            g = _gather_coo([p.grad for p in params], supports)
        else:
            g = torch.cat([_take(_grad(p), S_g) for p, S_g in zip(params, supports)])
        g = g.to(_moment_dtype(params[0]))
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
                if _is_sharded(p) and p.grad is not None and not _is_dense(p, group):
                    (g,) = self._read_gradients([p], group)  # zero at entries of other ranks
                    rows[p.device_mesh, g.dtype].append((p, g))
        reduced = {}
        for (mesh, _), row in rows.items():
            params, parts = zip(*row)
            dims = {d for p in params for d, cut in enumerate(p.placements) if hasattr(cut, "dim")}
            for p, g in row:  # of replicas, the first one contributes
                if any(mesh.get_coordinate()[d] for d in dims if p.placements[d].is_replicate()):
                    g.zero_()
            total = torch.cat(parts)
            for d in sorted(dims):
                dist.all_reduce(total, group=mesh.get_group(d))
            reduced.update(zip(params, total.split(list(map(len, parts)))))
        return reduced

    def _add(
        self, params: list[Tensor], updates: list[tuple[Tensor, Tensor, Tensor]], group: Group
    ) -> None:
        """Add updates to W[U] in each p's own memory; decoupled weight decay comes first.

        What is added in void slots, and to entries of other ranks, is 0. In half precision integers
        are added: the difference of the bits before and after.
        """
        Us, parts, voids = zip(*updates)
        half = params[0].dtype != parts[0].dtype
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
            (W.view(torch.int16) if half else W).scatter_add_(0, at, part)

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
        flat = torch.cat(list(entries)) if len(entries) > 1 else entries[0]
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
        except ValueError:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return settings and state, as torch's optimizers do; `seed` is never None in it."""
        self._init_seeds()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, also where the parameters had another precision.

        What other programs keep in `state[p]` comes back as it was saved.

        Raises:
            ValueError: It is not the state of an SO of such tensors; nothing is loaded then.
        """
        states: dict[Tensor, State] = {}

        def take_states(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            states.update(self._restored(saved))  # as other hooks have left it
            return {**saved, "state": {}}  # torch would cast it to the dtypes of the parameters

        hooks = [
            self.register_load_state_dict_pre_hook(take_states),
            self.register_load_state_dict_post_hook(
                lambda _: self.state.update(states), prepend=True
            ),
        ]
        try:
            super().load_state_dict(state_dict)
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"this is not a state dict of SO: {error!r} in it") from error
        finally:
            for hook in hooks:
                hook.remove()

    def _restored(self, saved: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Each parameter with its saved state, which must fit it, in its precision and place."""
        for saved_group, group in zip(saved["param_groups"], self.param_groups):
            _validate_group({**DEFAULTS_SINCE_1_0, **saved_group, "params": []})
            for number, p in zip(saved_group["params"], group["params"]):
                state = dict(saved["state"].get(number, {}))
                if not state.keys().isdisjoint(STATE_NAMES):
                    _validate_state(p, state, _is_dense(p, saved_group))
                for name, value in state.items():
                    if name == "step":  # a plain number in some files
                        value = torch.tensor(float(value), dtype=torch.float32, device="cpu")
                    elif name.startswith("exp_avg"):
                        value = _shard_like(value, p) if "indices" not in state else value
                        value = value.to(p.device, _moment_dtype(p), copy=True)
                    elif isinstance(value, Tensor):
                        value = value.to(p.device, copy=True)
                    state[name] = value if isinstance(value, Tensor) else deepcopy(value)
                if state:
                    yield p, state

    def __getstate__(self) -> dict[str, Any]:
        self._init_seeds()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.update({**DEFAULTS_SINCE_1_0, **group})
        self._init_caches()


# One step of one tensor, and the same of many tensors at once


def _single_tensor_so(
    state: State,
    g: Tensor,
    group: Group,
    score: Score,
    unite: Callable,
    topk: Callable,
    bias_corrections: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the step of the module's docstring on one tensor, whose gradient at S_g is g.

    The state gets the next S_m, m and v. `step` has counted t, and `_add` writes W.

    Args:
        unite, topk: `_unite` and `_topk`, or what does the same otherwise.
        bias_corrections: 1 - b1^t and 1 - b2^t where they are not the state's.

    Returns:
        The union, what to add to W there, and which of its slots are void, (|S_m| + k,) each.
    """
    (beta1, beta2), S_m, S_g = group["betas"], state["indices"], state["grad_indices"]
    at_S_m = [beta1 * state["exp_avg"], beta2 * state["exp_avg_sq"]]
    at_S_g = [(1 - beta1) * g, (1 - beta2) * g.square()]
    if "entry_steps" in state:
        at_S_m.append(state["entry_steps"])
        at_S_g.append(torch.zeros_like(S_g))
    U, void, rows = unite(S_m, S_g, at_S_m, at_S_g)
    m, v = rows[:2]
    if "entry_steps" in state:
        t = rows[2].add_(1).to(m.dtype)
        bias_corrections = [-torch.expm1(t * math.log(max(b, 1e-300))) for b in (beta1, beta2)]
    elif bias_corrections is None:
        t = state["step"].item()
        bias_corrections = 1 - beta1**t, 1 - beta2**t
    bias_correction1, bias_correction2 = bias_corrections
    denom = (v / bias_correction2).sqrt_().add_(group["eps"])
    update = (-group["lr"] / bias_correction1 * m).div_(denom).masked_fill_(void, 0)
    keep = topk(score(U, m, S_m).masked_fill_(void, -1), len(S_g))
    for name, row in zip(("indices", "exp_avg", "exp_avg_sq", "entry_steps"), (U, *rows)):
        state[name] = row.index_select(0, keep)
    return U, update, void


def _unite(
    S_m: Tensor, S_g: Tensor, at_S_m: list[Tensor], at_S_g: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Add rows of numbers at S_m to rows of numbers at S_g, on the union of both.

    The union has one slot for each entry of S_m and one for each of S_g, so that its size does not
    depend on the data: on a GPU the host would have to wait for it. Of the two neighboring slots of
    an entry of both the first one has the sum, and the second one is void.
    """
    U, order = torch.cat([S_m, S_g]).sort()
    void = torch.zeros_like(U, dtype=torch.bool)
    void[1:] = U[1:] == U[:-1]
    rows = [torch.cat(pair).index_select(0, order) for pair in zip(at_S_m, at_S_g)]
    for row in rows:
        row[:-1].add_(row[1:].where(void[1:], 0))
    return U, void, rows


def _multi_tensor_so(
    states: list[State], numels: list[int], gradients: list[Tensor], group: Group, score: Score
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Compute the step of `_single_tensor_so` on many tensors at once, as if they were one.

    Entry i of tensor j is entry i + offsets[j] of the joint tensor, of whose sorted union sizes[j]
    slots belong to tensor j.
    """
    names = [name for name in STATE_NAMES[1:] if name in states[0]]
    joint = {name: torch.cat([state[name] for state in states]) for name in names}
    offsets = list(accumulate(numels, initial=0))[:-1]
    like, counts = joint["grad_indices"], {}
    for name in ("grad_indices", "indices"):
        counts[name] = [len(state[name]) for state in states]
        joint[name] = joint[name] + _repeat(offsets, counts[name], like)
        if like.is_cpu and sum(numels) < 2**31:
            joint[name] = joint[name].int()  # is sorted in half the time
    ks, sizes = counts["grad_indices"], [sum(pair) for pair in zip(*counts.values())]
    steps = [state["step"].item() for state in states]
    bias_corrections = [
        _repeat([1 - beta**t for t in steps], sizes, joint["exp_avg"]) for beta in group["betas"]
    ]
    g, topk = torch.cat(gradients), partial(_segment_topk, sizes, ks)
    U, update, void = _single_tensor_so(joint, g, group, score, _unite, topk, bias_corrections)
    U = U.long() - _repeat(offsets, sizes, like)
    joint["indices"] = joint["indices"].long() - _repeat(offsets, ks, like)
    for name in names[1:]:  # all but S_g
        for state, part in zip(states, _split_copy(joint[name], ks)):
            state[name] = part
    return zip(U.split(sizes), update.split(sizes), void.split(sizes))


def _segment_topk(sizes: list[int], ks: list[int], score: Tensor, _: int) -> Tensor:
    """Positions of the ks[j] highest scores in each segment, of sizes[j], of a row."""
    positions, start = [], 0
    for (size, k), same in groupby(zip(sizes, ks)):
        end = start + size * len(list(same))
        first = torch.arange(start, end, size, device=score.device)
        positions.append((first[:, None] + _topk(score[start:end].view(-1, size), k)).view(-1))
        start = end
    return torch.cat(positions)


def _topk(score: Tensor, k: int) -> Tensor:
    """Positions of the k highest scores in each row, (..., size) -> (..., k), in any order.

    Long rows are sorted by the leading 16 bits of their float32 numbers only: those that are not
    negative have the order of their bits, and void slots, of -1, come last.
    """
    if not score.is_cpu or score.dtype == torch.float64 or score.shape[-1] < LARGE:
        return score.topk(k, sorted=False).indices
    if score.dim() > 1:
        return torch.stack([_topk(row, k) for row in score])
    bucket = (score.view(torch.int32) >> 16).add_(1).clamp_(min=0)
    at_least = bucket.bincount(minlength=2**15 + 2).flip(0).cumsum(0).flip(0)
    last = int((at_least >= k).sum()) - 1  # the bucket of the k-th
    keep = bucket > last
    some = (bucket == last).nonzero().view(-1)
    more = score[some].topk(k - int(at_least[last + 1]), sorted=False).indices
    return keep.index_fill_(0, some[more], True).nonzero().view(-1)


def _is_large(p: Tensor, state: State) -> bool:
    """Whether p's supports are united by `_unite_large`, with scratch of p's size."""
    slots = 2 * len(state["grad_indices"])
    return slots >= LARGE and 16 * slots >= p.numel() and p.is_cpu


def _unite_large(
    numel: int, S_m: Tensor, S_g: Tensor, at_S_m: list[Tensor], at_S_g: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As `_unite`, S_m before S_g: a table tells where an entry of S_g is in S_m, if it is."""
    table = torch.empty(numel, dtype=torch.int32, device="cpu")  # right at S_m, garbage elsewhere
    table.scatter_(0, S_m, torch.arange(len(S_m), dtype=torch.int32, device="cpu"))
    slot = table.index_select(0, S_g).clamp_(0, len(S_m) - 1)
    both = (S_m.index_select(0, slot) == S_g).nonzero().view(-1)
    slot = slot.index_select(0, both)
    rows = [torch.cat(pair) for pair in zip(at_S_m, at_S_g)]
    for row, new in zip(rows, at_S_g):
        row.index_add_(0, slot, new.index_select(0, both))
    U = torch.cat([S_m, S_g])
    return U, torch.zeros_like(U, dtype=torch.bool).index_fill_(0, both + len(S_m), True), rows


def _repeat(values: list, counts: list[int], like: Tensor) -> Tensor:
    """Repeat values[j] counts[j] times without waiting for the device; (1,) where all are equal."""
    row = torch.tensor(values, dtype=like.dtype, device="cpu").to(like.device, non_blocking=True)
    if len(set(values)) == 1:
        return row[:1]
    times = torch.tensor(counts, device="cpu").to(like.device, non_blocking=True)
    return row.repeat_interleave(times, output_size=sum(counts))


def _split_copy(row: Tensor, sizes: list[int]) -> list[Tensor]:
    """Split a row (sum of sizes,) into tensors of their own memory: a view keeps the row alive."""
    parts = [row.new_empty(size) for size in sizes]
    torch.split_with_sizes_copy(row, sizes, out=parts)
    return parts


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
    mask = torch.zeros(numel, dtype=torch.bool, device="cpu")
    while (missing := k - int(mask.count_nonzero())) > 0:
        if 4 * k > numel:  # repeats would be many
            more = torch.randperm(numel, generator=generator, device="cpu")[:k]
        else:
            more = torch.randint(numel, (missing,), generator=generator, device="cpu")
        mask.index_fill_(0, more, True)
    return mask.nonzero().view(-1)


def _take(t: Tensor, flat: Tensor) -> Tensor:
    """Entries of t at flat indices; of a sharded tensor, 0 at those of other ranks."""
    memory, at, outside = _locate(t, flat)
    entries = memory.index_select(0, at)
    return entries if outside is None else entries.masked_fill_(outside, 0)


def _locate(t: Tensor, flat: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The memory of t, where in it flat entries are, and which of them other ranks have (at 0)."""
    if t.is_contiguous() and not _is_sharded(t):
        return t.view(-1), flat, None
    local = _local(t)
    at, extent = torch.zeros_like(flat), 1
    outside = torch.zeros_like(flat, dtype=torch.bool)
    dims = list(zip(t.shape, *_shard_box(t), local.stride()))
    for full, length, first, stride in reversed(dims):
        i, flat = flat % full - first, flat // full
        outside |= (i < 0) | (i >= length)
        at, extent = at + i * stride, extent + (length - 1) * stride
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


def _is_sharded(t: Tensor) -> bool:
    return hasattr(t, "device_mesh")


def _local(t: Tensor) -> Tensor:
    """This rank's shard of a DTensor, in its own memory; any other tensor itself."""
    return t.to_local() if _is_sharded(t) else t


def _grad(p: Tensor) -> Tensor:
    """The gradient of p, sharded as p is."""
    grad = p.grad
    if _is_sharded(p) and grad.placements != p.placements:
        grad = grad.redistribute(placements=p.placements)
    return grad


def _shard_box(t: Tensor) -> tuple[Sequence[int], Sequence[int]]:
    """Length and first index in each dimension of this rank's shard."""
    if not _is_sharded(t):
        return t.shape, [0] * t.dim()
    from torch.distributed.tensor import _utils

    return _utils.compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)


def _flat_indices(t: Tensor) -> Tensor:
    """The flat index of each entry of t, in a sharded tensor those of this rank's shard."""
    flat = torch.zeros((), dtype=torch.int64, device=t.device)
    for full, length, first in zip(t.shape, *_shard_box(t)):
        flat = flat[..., None] * full + torch.arange(first, first + length, device=t.device)
    return flat


def _shard_like(value: Tensor, p: Tensor) -> Tensor:
    """A saved moment of a dense tensor, whole or sharded as p is."""
    whole = value.full_tensor() if _is_sharded(value) else value
    if not _is_sharded(p):
        return whole
    shard = torch.zeros_like(p, dtype=value.dtype)
    box = (slice(first, first + length) for length, first in zip(*_shard_box(p)))
    _local(shard).copy_(whole[tuple(box)])
    return shard


# Checks and warnings


def _is_dense(p: Tensor, group: Group) -> bool:
    """Whether plain Adam updates this tensor: as its group says, else by its dimensions."""
    return sum(size > 1 for size in p.shape) < 2 if group["dense"] is None else group["dense"]


def _moment_dtype(p: Tensor) -> torch.dtype:
    """The dtype of p's moments: its own, but float32 for half precision."""
    return torch.promote_types(p.dtype, torch.float32)


def _warn(message: str) -> None:
    """Warn at the line of the program that called, past torch's frames and this file's."""
    frame, level = sys._getframe(1), 1
    while frame.f_code.co_filename.startswith((os.path.dirname(torch.__file__), __file__)):
        if frame.f_back is None:
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level + 1)


def _warn_if_too_sparse(supports: list[tuple[Tensor, int]]) -> None:
    """Warn of sparse tensors that keep so few entries that they will barely train."""
    few = [str(tuple(p.shape)) for p, k in supports if k < 10 < p.numel()]
    if few:
        _warn(
            f"SO keeps fewer than ten entries of {len(few)} of {len(supports)} sparse tensors "
            f"({', '.join(few[:3] + ['...'] * (len(few) > 3))}), which will barely train: raise "
            "density_ratio (and lr), or put them into a group with dense=True, also faster there"
        )


def _broadcast_seed(seed: int, groups: int) -> int:
    """The seed of rank 0; every rank must ask for one, for as many groups, at the same point."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    row = torch.tensor([0x5EED, groups, seed], device=device)
    try:  # of a fixed size, as another rank may be in an exchange of something else
        dist.broadcast(row, src=0)
        if row.tolist()[:2] != [0x5EED, groups]:
            raise RuntimeError(f"got {row.tolist()}")
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank()} got no seed of SO from rank 0: all ranks must step the same "
            "SO together. Where they do not (pipeline stages, an optimizer on one rank only), give "
            "every SO a seed=, and nothing is exchanged"
        ) from error
    return int(row[2])


def _validate_state(p: Tensor, state: State, dense: bool) -> None:
    """Raise ValueError where a saved state is not p's: a step writes where its indices say."""
    supports = [] if dense else [state["grad_indices"], state["indices"]]
    shape = p.shape if dense else state["indices"].shape
    moments = [state["exp_avg"], state["exp_avg_sq"]]
    step = torch.as_tensor(state["step"], device="cpu").flatten().tolist()
    good = len(step) == 1 and 0 <= step[0] < math.inf
    good &= all(m.shape == shape and m.is_floating_point() and not m.is_meta for m in moments)
    good &= all(t.layout == torch.strided for t in (*supports, *moments))
    if "entry_steps" in state:
        good &= state["entry_steps"].dtype == torch.int64 and state["entry_steps"].shape == shape
    for s in supports if good else ():
        good &= s.dtype == torch.int64 and s.dim() == 1 and 0 < len(s) == len(s.unique())
        good = good and 0 <= int(s.min()) and int(s.max()) < p.numel()
    if not good:
        raise ValueError(f"the saved state is not that of a tensor of shape {tuple(p.shape)}")


def _is_number(value: Any, below: float = math.inf) -> bool:
    return hasattr(value, "__float__") and 0 <= value < below


RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {  # what a setting must be, and the test
    **dict.fromkeys(("lr", "eps", "weight_decay"), ("a number of 0 or more", _is_number)),
    "betas": ("two numbers in [0, 1)", lambda b: [_is_number(x, 1) for x in b] == [True, True]),
    "density_ratio": ("in (0, 1]", lambda density: _is_number(density) and 0 < density <= 1),
    "T": ("an int of 1 or more", lambda T: type(T) is int and T >= 1),
    "seed": ("an int or None", lambda seed: seed is None or hasattr(seed, "__index__")),
    "bias_correction": ("'tensor' or 'entry'", lambda kind: kind in ("tensor", "entry")),
    **dict.fromkeys(FLAGS, ("True or False", lambda flag: type(flag) is bool)),
    **dict.fromkeys(
        ("dense", "foreach"), ("True, False or None", lambda f: f is None or type(f) is bool)
    ),
}


def _validate_group(group: Group) -> None:
    """Raise ValueError where a setting of a group is out of range, or a parameter is unfit."""
    for name, (allowed, test) in RULES.items():
        if not test(value := group[name]):
            raise ValueError(f"{name} must be {allowed}, not {value!r} ({type(value).__name__})")
    for key in group.keys() - RULES.keys() - {"params", "param_names"}:
        near = difflib.get_close_matches(str(key), [*RULES, "t", "density"], 1, 0.9)
        if near:
            name = {"t": "T", "density": "density_ratio"}.get(near[0], near[0])
            raise ValueError(f"a group has the unknown key {key!r}: write {name!r}")
    for p in group["params"]:
        _validate_parameter(p)


def _validate_parameter(p: Tensor) -> None:
    """Raise ValueError where SO cannot update a parameter."""
    what = f"a parameter of shape {tuple(p.shape)}"
    if p.is_complex() and p.requires_grad:
        raise ValueError(f"{what} is complex, not real")
    if getattr(p, "_fsdp_flattened", False):
        raise ValueError(
            f"{what} is a shard of FSDP's FullyShardedDataParallel, which flattens matrices: use "
            "fully_shard (FSDP2) or DistributedDataParallel"
        )
    if _is_sharded(p) and any(placement.is_partial() for placement in p.placements):
        raise ValueError(f"{what} has a Partial placement: redistribute it to Shard or Replicate")
