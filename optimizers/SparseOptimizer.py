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
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adam import adam
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
        weight_decay: L2 penalty, added to the gradient as in Adam.
        density_ratio: Fraction of entries kept, in (0, 1]; 1 - kappa in the paper.
        T: Steps between two draws of the gradient support.
        seed: Seed of the supports. None takes one from torch's global generator at the first draw;
            where torch.distributed is initialised, all processes then use that of rank 0.

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
    ) -> None:
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        defaults = dict(settings, density_ratio=density_ratio, T=T, seed=seed, dense=None)
        self._drawn: set[Tensor] = set()  # tensors that have their support for the coming step
        self._unshared: list[dict] = []  # groups with a seed that other processes do not know
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.draw_supports(lambda p: p.grad is not None)
        self._drawn.clear()
        for group in self.param_groups:
            dense, sparse = [], defaultdict(list)
            for p in sorted(group["params"], key=Tensor.numel):  # equal sizes together: `largest`
                if p.grad is None or p.numel() == 0:
                    continue
                if _is_dense(p, group):
                    dense.append(p)
                else:
                    self.state[p]["step"] += 1
                    sparse[p.dtype, p.device, _layout(p.grad)].append(p)
            if dense:
                self._dense_update(dense, group)
            for params in sparse.values():
                self._sparse_update(params, group)
        return loss

    def _sparse_update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Take the step of the module's docstring on many tensors at once.

        Their entries are numbered as one long row: entry i of tensor j is i + offsets[j]. The
        supports of all tensors are then one sorted row, of which `slots[j]` belong to tensor j.
        """
        states = [self.state[p] for p in params]
        counts = [len(state["grad_indices"]) for state in states]  # k of each tensor
        slots = [len(state["indices"]) + k for state, k in zip(states, counts)]
        offsets = list(accumulate((p.numel() for p in params), initial=0))[:-1]
        device = params[0].device

        def row(name: str) -> Tensor:
            return torch.cat([state[name] for state in states])

        def shift(counts: list[int]) -> Tensor:
            return repeat(offsets, counts, device, torch.int64)

        S_g = row("grad_indices") + shift(counts)
        S_m = row("indices") + shift([len(state["indices"]) for state in states])
        m, v = row("exp_avg"), row("exp_avg_sq")
        g = read_gradients(params, states, offsets, S_g).to(m.dtype)
        if group["weight_decay"] != 0:
            W = torch.cat([p.take(state["grad_indices"]) for p, state in zip(params, states)])
            g = g + group["weight_decay"] * W.to(m.dtype)

        U, m, v, repeats = merge_supports(S_m, S_g, m, v, g, *group["betas"])
        places = U - shift(slots)  # within each tensor
        bias1, bias2 = self._bias_corrections(group["betas"], states, places.split(slots), m)
        update = group["lr"] / bias1 * m / ((v / bias2).sqrt_() + group["eps"])
        if params[0].dtype == m.dtype:
            update = update.masked_fill(repeats, 0)  # an entry of both supports moves once
        for p, at, part in zip(params, places.split(slots), update.split(slots)):
            subtract(p, at, part)

        score = self._importance(U, m, S_m).masked_fill_(repeats, -1)  # no entry twice
        keep = largest(score, slots, counts)
        for name, kept in (("indices", places), ("exp_avg", m), ("exp_avg_sq", v)):
            for state, part in zip(states, apart(kept[keep], counts)):
                state[name] = part

    def _bias_corrections(
        self, betas: tuple[float, float], states: list[dict], places: Sequence[Tensor], m: Tensor
    ) -> Iterator[Tensor]:
        """1 - b1^t and 1 - b2^t at each slot of the union, whose entries are `places`."""
        steps, slots = [state["step"].item() for state in states], list(map(len, places))
        corrections = [[1 - beta**t for t in steps] for beta in betas]
        return (repeat(row, slots, m.device, m.dtype) for row in corrections)

    def _importance(self, U: Tensor, m: Tensor, S_m: Tensor) -> Tensor:
        """Score each slot of the union, 0 or more; the k highest make the next S_m."""
        return m.abs()

    @torch.no_grad()
    def draw_supports(self, wanted: Callable[[Tensor], bool] | None = None) -> None:
        """Draw the supports of the coming step where a window of T steps begins.

        Afterwards `state[p]["grad_indices"]` lists the entries that the coming step reads. Calling
        this is optional and, until that step, repeatable: `step` draws what nobody has drawn.

        Args:
            wanted: Tells which tensors will take part; those that require a gradient by default.
        """
        self._resolve_seeds(agree=True)
        generator = torch.Generator("cpu")
        drawn = defaultdict(list)  # by device: pairs of a tensor and its new support
        every = ((group, p) for group in self.param_groups for p in group["params"])
        for position, (group, p) in enumerate(every):
            if _is_dense(p, group) or p.numel() == 0 or p in self._drawn:
                continue
            if not (wanted(p) if wanted else p.requires_grad):
                continue
            step = int(self.state[p].get("step", 0))
            if self.state[p] and step % group["T"]:
                continue
            # A draw depends on seed, position and step alone: there is no generator to save, the
            # other tensors do not matter, and it is the same on every device.
            key = f"{group['seed']} {position} {step}".encode()
            generator.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big"))
            k = max(1, int(p.numel() * group["density_ratio"]))
            drawn[p.device].append((p, draw_support(p.numel(), k, generator)))
            self._drawn.add(p)
        if not any("grad_indices" in state for state in self.state.values()):
            _warn_of_few([len(support) for pairs in drawn.values() for _, support in pairs])
        for device, pairs in drawn.items():  # one copy to each device, which waits for nothing
            row = torch.cat([support for _, support in pairs]).to(device, non_blocking=True)
            for (p, _), support in zip(pairs, apart(row, [len(support) for _, support in pairs])):
                state = self.state[p]
                if "grad_indices" not in state:
                    zeros = torch.zeros(support.shape, dtype=_moment_dtype(p), device=device)
                    state["step"] = torch.zeros((), device="cpu")
                    state["indices"] = support.clone()  # S_m = S_g at t = 1
                    state["exp_avg"], state["exp_avg_sq"] = zeros, zeros.clone()
                state["grad_indices"] = support

    def _resolve_seeds(self, agree: bool = False) -> None:
        """Draw the seeds that were not given; if `agree`, take those of rank 0."""
        for group in self.param_groups:
            if group["seed"] is None:
                group["seed"] = int(torch.randint(2**62, (), device="cpu"))
                self._unshared.append(group)
        if agree and self._unshared and dist.is_available() and dist.is_initialized():
            seeds = [group["seed"] for group in self._unshared]
            dist.broadcast_object_list(seeds, src=0)
            for group, seed in zip(self._unshared, seeds):
                group["seed"] = seed
            self._unshared.clear()

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
        settings = {name: group[name] for name in ("lr", "weight_decay", "eps")}
        settings.update(zip(("beta1", "beta2"), group["betas"]), amsgrad=False, maximize=False)
        adam(weights, grads, exp_avgs, exp_avg_sqs, [], steps, **settings)
        for p, weight in zip(params, weights):
            if weight is not p:
                p.copy_(weight)

    # What torch.optim asks of an optimizer: groups, state dicts, pickles

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; what it does not set is as the constructor was told."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return settings and state, as torch's optimizers do; `seed` is never None in it."""
        self._resolve_seeds()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, also where the parameters had another precision.

        Raises:
            ValueError: It is not the state of an SO of such tensors; nothing is loaded then.
        """
        pairs: list[tuple[Tensor, dict]] = []  # as hooks before ours have left them
        hooks = [
            self.register_load_state_dict_pre_hook(lambda _, s: pairs.extend(self._match(s))),
            self.register_load_state_dict_post_hook(lambda _: self._reread(pairs), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"this is not a state dict of SO: {error!r} in it") from error
        finally:
            for hook in hooks:
                hook.remove()

    def _match(self, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, dict]]:
        """Pair each parameter with its saved state, which must fit it."""
        for saved, group in zip(state_dict["param_groups"], self.param_groups):
            _check({**saved, "params": []})
            for number, p in zip(saved["params"], group["params"]):
                if (state := state_dict["state"].get(number, {})) != {}:
                    _check_state(p, state, _is_dense(p, saved))
                    yield p, state

    def _reread(self, pairs: list[tuple[Tensor, dict]]) -> None:
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
        self._resolve_seeds()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._drawn, self._unshared = set(), []


# The parts of a step: functions of tensors


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


def merge_supports(
    S_m: Tensor, S_g: Tensor, m: Tensor, v: Tensor, g: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Update the moments on the union of both supports.

    The union has a slot for each entry of S_m (k,) and each of S_g (l,), so that its size does not
    depend on the data, which a GPU would have to be waited for. An entry of both has two
    neighbouring slots, with the same values in both.

    Returns:
        The union in increasing order, m and v there, and which slots repeat the one before:
        (k + l,) each.
    """
    union, order = torch.cat([S_m, S_g]).sort()
    m = torch.cat([beta1 * m, (1 - beta1) * g])[order]
    v = torch.cat([beta2 * v, (1 - beta2) * g.square()])[order]
    repeats = torch.zeros_like(union, dtype=torch.bool)
    repeats[1:] = union[1:] == union[:-1]
    for moment in (m, v):  # in S_m and S_g: the decayed moment plus the new part
        both = moment[1:] + moment[:-1]
        moment[1:] = both.where(repeats[1:], moment[1:])
        moment[:-1] = both.where(repeats[1:], moment[:-1])
    return union, m, v, repeats


def subtract(p: Tensor, places: Tensor, update: Tensor) -> None:
    """Subtract from flat entries of p in its own memory, whatever its strides.

    Half precision is rounded once; there, a place that repeats gets the same value twice.
    """
    if p.is_contiguous():
        memory, at = p.view(-1), (places,)
    else:
        memory, at = p, ()
        for size in reversed(p.shape):
            at, places = (places % size, *at), places // size
    if p.dtype == update.dtype and p.is_contiguous():
        memory.index_add_(0, places, update, alpha=-1)
    elif p.dtype == update.dtype:
        memory.index_put_(at, -update, accumulate=True)
    else:
        memory.index_put_(at, (memory[at].to(update.dtype) - update).to(p.dtype))


def largest(score: Tensor, slots: list[int], counts: list[int]) -> Tensor:
    """Positions of the counts[j] largest scores in each segment, of slots[j], of a row."""
    found, start = [], 0
    for (width, k), alike in groupby(zip(slots, counts)):
        rows = len(list(alike))
        part = score[start : start + rows * width].view(rows, width)
        first = torch.arange(start, start + rows * width, width, device=score.device)
        found.append((first[:, None] + part.topk(k, dim=-1, sorted=False).indices).view(-1))
        start += rows * width
    return torch.cat(found)


def repeat(values: list, counts: list[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Repeat values[j] counts[j] times, without waiting for the device: (sum of counts,)."""
    row = torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)
    times = torch.tensor(counts, device="cpu").to(device, non_blocking=True)
    return row.repeat_interleave(times, output_size=sum(counts))


def apart(row: Tensor, sizes: list[int]) -> list[Tensor]:
    """Cut a row (sum of sizes,) into tensors of their own memory: a view keeps the row alive."""
    parts = [row.new_empty(size) for size in sizes]
    torch.split_with_sizes_copy(row, sizes, out=parts)
    return parts


def read_gradients(params: list[Tensor], states: list, offsets: list[int], S_g: Tensor) -> Tensor:
    """Gradients at S_g, (k,): strided ones, or sparse COO ones, zero where an entry is absent."""
    grads = [p.grad for p in params]
    if _layout(grads[0]) is None:
        return torch.cat([g.take(state["grad_indices"]) for g, state in zip(grads, states)])
    counts = [grad._nnz() for grad in grads]
    positions = torch.cat([grad._indices() for grad in grads], dim=1)  # (d, nnz)
    flat = repeat(offsets, counts, S_g.device, torch.int64)
    for dim, position in enumerate(positions):
        strides = [grad.shape[dim + 1 :].numel() for grad in grads]
        flat = flat + position * repeat(strides, counts, S_g.device, torch.int64)
    values = torch.cat([grad._values() for grad in grads])  # (nnz, ...): entries, or whole rows
    row = torch.arange(values.shape[1:].numel(), device=S_g.device)
    flat = (flat[:, None] + row).view(-1)
    slot = torch.searchsorted(S_g, flat).clamp_(max=len(S_g) - 1)
    found = values.reshape(-1).where(S_g[slot] == flat, 0)
    return found.new_zeros(S_g.shape).index_add_(0, slot, found)  # repeated entries add up


def _is_dense(p: Tensor, group: dict[str, Any]) -> bool:
    """Whether plain Adam updates this tensor: as its group says, else by its dimensions."""
    return p.dim() < 2 if group["dense"] is None else group["dense"]


def _layout(grad: Tensor) -> tuple[int, int] | None:
    """What sparse gradients must share to be read together; None for strided ones."""
    if grad.layout != torch.sparse_coo:
        return None
    return grad.sparse_dim(), grad.shape[grad.sparse_dim() :].numel()


def _moment_dtype(p: Tensor) -> torch.dtype:
    """The dtype of p's moments: its own, but float32 for half precision."""
    return torch.promote_types(p.dtype, torch.float32)


def _warn_of_few(counts: list[int]) -> None:
    """Warn where most sparse tensors keep so few entries that they will barely train."""
    few = sum(k < 10 for k in counts)
    if 2 * few > len(counts):
        warnings.warn(
            f"SO keeps fewer than ten entries of {few} of {len(counts)} sparse tensors, which will "
            "barely train: raise density_ratio (and lr), or put them into a group with dense=True",
            stacklevel=7,  # the line that called step
        )


def _check_state(p: Tensor, state: dict[str, Any], dense: bool) -> None:
    """Raise ValueError where a saved state is not p's: a step writes where its indices say."""
    supports = [] if dense else [state["grad_indices"], state["indices"]]
    shape = p.shape if dense else state["indices"].shape
    moments = [state["exp_avg"], state["exp_avg_sq"]]
    step = torch.as_tensor(state["step"], device="cpu").flatten().tolist()
    good = len(step) == 1 and 0 <= step[0] < float("inf")
    good &= all(m.shape == shape and m.is_floating_point() and not m.is_meta for m in moments)
    good &= all(t.layout == torch.strided for t in (*supports, *moments))
    for s in supports if good else ():
        good &= s.dtype == torch.int64 and s.dim() == 1 and 0 < len(s) == len(s.unique())
        good = good and 0 <= int(s.min()) and int(s.max()) < p.numel()
    if not good:
        raise ValueError(f"the saved state is not that of a tensor of shape {tuple(p.shape)}")


def _check(group: dict[str, Any]) -> None:
    """Raise ValueError where a setting of a group is out of range, or a parameter is unfit."""
    beta1, beta2 = group["betas"] if len(group["betas"]) == 2 else (1, 1)
    T, seed, dense = group["T"], group["seed"], group["dense"]
    rules = {
        "lr": (group["lr"] >= 0, "0 or more"),
        "eps": (group["eps"] >= 0, "0 or more"),
        "betas": (0 <= beta1 < 1 and 0 <= beta2 < 1, "two numbers in [0, 1)"),
        "weight_decay": (group["weight_decay"] >= 0, "0 or more"),
        "density_ratio": (0 < group["density_ratio"] <= 1, "in (0, 1]"),
        "T": (type(T) is int and T >= 1, "a whole number of steps, 1 or more"),
        "seed": (seed is None or hasattr(seed, "__index__"), "a whole number or None"),
        "dense": (dense is None or isinstance(dense, bool), "True, False or None"),
    }
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
