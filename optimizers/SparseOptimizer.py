"""SO: Adam whose gradients and moments live on a tiny, moving support of each weight matrix.

Mrabah, Richet, Ben Ayed, Granger, "Sparsity Outperforms Low-Rank Projections in Few-Shot
Adaptation", ICCV 2025, https://arxiv.org/abs/2504.12436. For a matrix W of n entries,
k = max(1, floor(n * density_ratio)), and step t:

    S_g ~ k of the n entries, uniform without replacement, on steps 1, T + 1, 2 T + 1, ...
    g   = dL/dW at S_g + weight_decay * W at S_g, and zero elsewhere
    U   = S_m union S_g                                       (S_m = S_g at t = 1)
    m   = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2        at U
    W  -= lr * m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)  at U
    S_m = the k entries of U with the largest |m|

This file needs nothing but torch: copy it, and use it like Adam.

    optimizer = SO(model.parameters(), lr=3e-4, density_ratio=5e-4, T=10)
    for inputs, targets in loader:
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import Optimizer

__all__ = ["SO"]


def draw_support(numel: int, k: int, generator: torch.Generator) -> Tensor:
    """Draw k distinct flat indices of numel entries, uniform without replacement.

    Redrawing repeats leaves the first k distinct values of an endless independent sequence,
    which by symmetry is a uniform subset; it costs O(k log k) and never a permutation of numel.

    Returns:
        The indices in increasing order, (k,) int64 on the CPU.
    """
    if k == numel:
        return torch.arange(numel)
    if 4 * k > numel:  # repeats would be many; a permutation is no larger than four supports
        return torch.randperm(numel, generator=generator)[:k].sort().values
    support = torch.randint(numel, (k,), generator=generator).unique()
    while len(support) < k:
        more = torch.randint(numel, (k - len(support),), generator=generator)
        support = torch.cat([support, more]).unique()
    return support


def merge_supports(
    indices: Tensor,
    grad_indices: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    beta1: float,
    beta2: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Update the moments on the union of both supports.

    The union's size depends on the data; to need no synchronisation on a GPU it always has k + l
    slots, and an entry of both supports fills two neighbouring slots with the same values.

    Args:
        indices: S_m, (k,), in any order.
        grad_indices: S_g, (l,).
        exp_avg: m at S_m, (k,).
        exp_avg_sq: v at S_m, (k,).
        grad: g at S_g, (l,).
        beta1: Decay of m.
        beta2: Decay of v.

    Returns:
        The union's indices in increasing order, m and v there, and which slots repeat the one
        before: (k + l,) each.
    """
    union, order = torch.cat([indices, grad_indices]).sort()
    m = torch.cat([beta1 * exp_avg, (1 - beta1) * grad])[order]
    v = torch.cat([beta2 * exp_avg_sq, (1 - beta2) * grad.square()])[order]
    repeats = torch.zeros_like(union, dtype=torch.bool)
    repeats[1:] = union[1:] == union[:-1]
    for moment in (m, v):  # on S_m and S_g both: the decayed moment plus the new part
        both = moment[1:] + moment[:-1]
        moment[1:] = both.where(repeats[1:], moment[1:])
        moment[:-1] = both.where(repeats[1:], moment[:-1])
    return union, m, v, repeats


def largest(score: Tensor, slots: list[int], counts: list[int]) -> Tensor:
    """Find the counts[i] largest scores in each segment of slots[i]: their places in score."""
    found, start = [], 0
    for (width, k), alike in groupby(zip(slots, counts, strict=True)):
        rows = len(list(alike))
        part = score[start : start + rows * width].view(rows, width)
        first = torch.arange(start, start + rows * width, width, device=score.device)
        found.append((first[:, None] + part.topk(k, dim=-1, sorted=False).indices).view(-1))
        start += rows * width
    return torch.cat(found)


def spread(values: list[int], counts: list[int], device: torch.device) -> Tensor:
    """Repeat values[i] counts[i] times, (sum of counts,) int64, without waiting for the device."""
    table = torch.tensor([values, counts]).to(device, non_blocking=True)
    return table[0].repeat_interleave(table[1], output_size=sum(counts))


def apart(row: Tensor, sizes: list[int]) -> list[Tensor]:
    """Cut a row (sum of sizes,) into tensors of their own memory: a view keeps the row alive."""
    parts = [row.new_empty(size) for size in sizes]
    torch.split_with_sizes_copy(row, sizes, out=parts)
    return parts


class Run(NamedTuple):
    """Tensors that lie back to back in one storage, so that one kernel reads or writes them all."""

    flat: Tensor  # a flat view of them; a single one that is not contiguous stands for itself
    tensors: slice  # which they are
    start: int  # entries of all tensors before them


def join(tensors: Sequence[Tensor]) -> list[Run]:
    """Find the runs among tensors, which are taken as one row of entries, in their order."""
    runs: list[Run] = []
    start, end = 0, None
    for number, tensor in enumerate(tensors):
        place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
        first = number, start
        if place == end and tensor.is_contiguous():
            run = runs.pop()
            first = run.tensors.start, run.start
        start += tensor.numel()
        flat, end = tensor, None
        if tensor.is_contiguous():
            entries = start - first[1]
            before = entries - tensor.numel()
            flat = tensor.as_strided((entries,), (1,), place[1] - before)
            end = place[0], place[1] + tensor.numel()
        runs.append(Run(flat, slice(first[0], number + 1), first[1]))
    return runs


def places(runs: list[Run], at: Tensor, counts: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair the runs with places in them: increasing ones in the row, counts[i] in the tensor i."""
    parts = at.split([sum(counts[run.tensors]) for run in runs])
    for run, part in zip(runs, parts, strict=True):
        yield run.flat, part - run.start


def read(runs: list[Run], at: Tensor, counts: list[int]) -> Tensor:
    """Read a row at places that increase, counts[i] of them in the tensor i: like `at`."""
    return torch.cat([flat.take(local) for flat, local in places(runs, at, counts)])


def write(runs: list[Run], at: Tensor, counts: list[int], values: Tensor) -> None:
    """Write values into the tensors' own memory, at places as in `read`."""
    parts = values.to(runs[0].flat.dtype).split([sum(counts[run.tensors]) for run in runs])
    for (flat, local), part in zip(places(runs, at, counts), parts, strict=True):
        if flat.dim() == 1:
            flat.index_copy_(0, local, part)  # scatter_ copies all of a half-precision tensor
        else:
            flat.index_put_(torch.unravel_index(local, flat.shape), part)


def read_sparse(grads: Sequence[Tensor], starts: list[int], at: Tensor) -> Tensor:
    """Read sparse COO gradients, taken as one row of entries: zero where one is absent.

    Args:
        grads: Of equally many sparse dimensions and equal shapes of the dense ones; entries may
            repeat, and count as their sum.
        starts: Entries before each of them.
        at: Places in the row, increasing, (k,).

    Returns:
        The entries, (k,).
    """
    positions = torch.cat([grad._indices() for grad in grads], dim=1)  # (d, nnz)
    values = torch.cat([grad._values() for grad in grads])  # (nnz, ...)
    counts = [grad._nnz() for grad in grads]
    flat = spread(starts, counts, at.device)
    for dim, position in enumerate(positions):
        strides = [grad.shape[dim + 1 :].numel() for grad in grads]
        flat = flat + position * spread(strides, counts, at.device)
    row = values.shape[1:].numel()  # 1, or more where whole rows are listed
    flat = (flat[:, None] + torch.arange(row, device=at.device)).view(-1)
    slot = torch.searchsorted(at, flat).clamp_(max=len(at) - 1)
    found = values.reshape(-1).where(at[slot] == flat, 0)
    return found.new_zeros(at.shape).index_add_(0, slot, found)


class SO(Optimizer):
    """Adam on a sparse, moving support of each tensor; see the module's docstring.

    State, per tensor: `step` (t); of sparse ones also `grad_indices` (S_g), `indices` (S_m),
    `exp_avg` (m) and `exp_avg_sq` (v), of k entries each, the moments in float32 or better.
    Settings are in `param_groups`, `seed` included: a state dict continues bit for bit. A copy of
    a sparse tensor in another dtype, as its attribute `low_precision`, is kept equal to it.

    Args:
        params: Tensors, or dicts of groups, which may name each argument below for themselves,
            and `dense`: True for plain Adam, False for SO. Without it tensors of two or more
            dimensions are sparse, the others (biases, norms) dense.
        lr: Learning rate.
        betas: Decay of the first and second moment, each in [0, 1).
        eps: Added to the denominator.
        weight_decay: L2 penalty, added to the gradient as Adam does.
        density_ratio: Share of entries kept, in (0, 1]: 1 - kappa in the paper.
        T: Steps between two draws of the gradient support.
        seed: Of the supports, whatever else uses torch's generator. None takes one from torch's
            global generator when the first support is drawn.

    Raises:
        ValueError: An argument is outside its range, there are no parameters, or one is complex.
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
        _check(defaults)
        self._drawn: set[Tensor] = set()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; what it does not name is as the constructor was told."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, and return the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Parameters may be of a class whose every access takes a detour; here none is wanted.
        with torch._C.DisableTorchFunctionSubclass():
            self._draw(only_with_gradient=True)
            for group in self.param_groups:
                self._step(group)
        self._drawn.clear()
        return loss

    @torch.no_grad()
    def draw_supports(self) -> None:
        """Draw the supports of the coming step where they are due, before its gradients exist.

        Afterwards `state[p]["grad_indices"]` holds the entries that the coming step reads. Calling
        this is optional and, until that step, repeatable: `step` draws what nobody has.
        """
        self._draw(only_with_gradient=False)

    def state_dict(self) -> dict[str, Any]:
        """Return settings and state, as torch's optimizers do; `seed` is never None in it."""
        self._resolve_seeds()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, also where parameters had another precision.

        Raises:
            ValueError: It is not the state of an SO of such tensors; nothing is loaded then.
        """
        loaded = []  # what the hooks before loading have made of it

        def take(_: Optimizer, state: dict[str, Any]) -> None:
            self._check_saved(state)
            loaded.append(state)

        hooks = [
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(lambda _: self._reread(*loaded), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no state dict of SO: {error!r} in it") from error
        finally:
            for hook in hooks:
                hook.remove()

    def _check_saved(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError, or what comes of its lacks, where a state is of other tensors."""
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            _check({**saved, "params": group["params"]})
            for number, p in zip(saved["params"], group["params"], strict=False):
                state = state_dict["state"].get(number, {})
                if state != {}:
                    _check_state(p, state, _is_dense(p, saved))

    def _reread(self, state_dict: dict[str, Any]) -> None:
        """Load state as it is: torch has cast it to the parameters' dtype, indices included."""
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                device = "cpu" if name == "step" else p.device
                dtype = _moment_dtype(p) if name.startswith("exp_avg") else value.dtype
                self.state[p][name] = value.to(device, dtype, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        self._resolve_seeds()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._drawn = set()

    def _step(self, group: dict[str, Any]) -> None:
        """Update one group's tensors, as many at once as have their dtype in common."""
        params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
        self._dense_update([p for p in params if _is_dense(p, group)], group)
        alike = defaultdict(list)
        for p in sorted(params, key=Tensor.numel):  # equal sizes side by side: see `largest`
            if not _is_dense(p, group):
                self.state[p]["step"] += 1
                copied = hasattr(p, "low_precision")
                alike[p.dtype, p.device, _layout(p.grad), copied].append(p)
        for rows in alike.values():
            self._sparse_update(rows, group)

    def _resolve_seeds(self) -> None:
        """Give each group that was told no seed one from torch's global generator."""
        for group in self.param_groups:
            if group["seed"] is None:
                group["seed"] = int(torch.randint(2**62, (), device="cpu"))

    def _draw(self, only_with_gradient: bool) -> None:
        """Draw where a window of T steps begins, and start the state of new tensors."""
        self._resolve_seeds()
        generator = torch.Generator("cpu")
        supports = defaultdict(list)  # by device: pairs of a tensor and its new support
        position = -1  # counts all tensors: one's draws do not depend on what the others do
        for group in self.param_groups:
            for p in group["params"]:
                position += 1
                wanted = p.grad is not None if only_with_gradient else p.requires_grad
                if not wanted or _is_dense(p, group) or p.numel() == 0 or p in self._drawn:
                    continue
                state = self.state[p]
                step = int(state["step"]) if state else 0
                if state and step % group["T"]:
                    continue
                # A draw is a function of (seed, tensor, step) alone: there is no generator to
                # save, and it is the same on every device.
                key = f"{group['seed']} {position} {step}".encode()
                generator.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big"))
                k = max(1, int(p.numel() * group["density_ratio"]))
                supports[p.device].append((p, draw_support(p.numel(), k, generator)))
                self._drawn.add(p)
        for device, pairs in supports.items():  # one copy to each device, which waits for nothing
            row = torch.cat([support for _, support in pairs]).to(device, non_blocking=True)
            sizes = [len(support) for _, support in pairs]
            for (p, _), support in zip(pairs, apart(row, sizes), strict=True):
                state = self.state[p]
                state["grad_indices"] = support
                if "indices" not in state:
                    zeros = support.new_zeros(support.shape, dtype=_moment_dtype(p))
                    state["step"] = torch.zeros((), device="cpu")
                    state["indices"] = support.clone()  # S_m = S_g at t = 1
                    state["exp_avg"], state["exp_avg_sq"] = zeros, zeros.clone()

    def _sparse_update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update tensors of one dtype, device and layout of gradients as one long row."""
        states = [self.state[p] for p in params]
        starts = list(accumulate((p.numel() for p in params), initial=0))[:-1]
        counts = [len(state["grad_indices"]) for state in states]  # k of each tensor
        device, runs = params[0].device, join(params)

        def row(name: str) -> Tensor:
            return torch.cat([state[name] for state in states])

        shift = spread(starts, counts, device)
        grad_indices = row("grad_indices") + shift
        olds = [len(state["indices"]) for state in states]  # k, unless the density has changed
        indices = row("indices") + (shift if olds == counts else spread(starts, olds, device))
        exp_avg, exp_avg_sq = row("exp_avg"), row("exp_avg_sq")
        if _layout(params[0].grad) is None:
            rows = zip(params, states, strict=True)  # grad is flat, row-major, whatever its strides
            grad = torch.cat([p.grad.take(state["grad_indices"]) for p, state in rows])
        else:
            grad = read_sparse([p.grad for p in params], starts, grad_indices)
        grad = grad.to(exp_avg.dtype)
        if group["weight_decay"] != 0:
            weight = read(runs, grad_indices, counts).to(exp_avg.dtype)
            grad = grad + group["weight_decay"] * weight

        slots = [k + old for k, old in zip(counts, olds, strict=True)]
        beta1, beta2 = group["betas"]
        union, m, v, repeats = merge_supports(
            indices, grad_indices, exp_avg, exp_avg_sq, grad, beta1, beta2
        )
        steps = [state["step"].item() for state in states]
        bias1, bias2 = 1 - beta1 ** steps[0], 1 - beta2 ** steps[0]
        if len(set(steps)) > 1:  # some were frozen for a while
            table = [[1 - beta**step for step in steps] for beta in (beta1, beta2)]
            bias = torch.tensor(table, dtype=m.dtype).to(device, non_blocking=True)
            bias1, bias2 = bias[:, spread(list(range(len(steps))), slots, device)]
        denominator = (v / bias2).sqrt_().add_(group["eps"])
        update = group["lr"] / bias1 * m / denominator
        weight = read(runs, union, slots).to(m.dtype) - update
        write(runs, union, slots, weight)
        if hasattr(params[0], "low_precision"):
            write(join([p.low_precision for p in params]), union, slots, weight)
        for p in params:  # autograd counts the writes to each tensor, which a view of many hides
            torch.autograd.graph.increment_version(p)

        score = self._importance(union, m, indices).masked_fill_(repeats, -1)  # no entry twice
        keep = largest(score, slots, counts)
        kept = ("indices", union[keep] - shift), ("exp_avg", m[keep]), ("exp_avg_sq", v[keep])
        for name, values in kept:
            for state, part in zip(states, apart(values, counts), strict=True):
                state[name] = part

    def _importance(self, union: Tensor, m: Tensor, indices: Tensor) -> Tensor:
        """Score slots of the union by what makes an entry stay in S_m, 0 or more: here by |m|."""
        return m.abs()

    def _dense_update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update whole tensors by torch's own Adam, half precision through float32 copies."""
        if not params:
            return
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), device="cpu")
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(p, dtype=_moment_dtype(p))
        states = [self.state[p] for p in params]
        weights = [p.to(_moment_dtype(p)) for p in params]
        grads = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in params]
        adam(
            weights,
            [grad.to(weight.dtype) for grad, weight in zip(grads, weights, strict=True)],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for p, weight in zip(params, weights, strict=True):
            if weight is not p:
                p.copy_(weight)


def _is_dense(p: Tensor, group: dict[str, Any]) -> bool:
    """Whether plain Adam updates this tensor: as its group says, else by its dimensions."""
    return p.dim() < 2 if group["dense"] is None else group["dense"]


def _layout(grad: Tensor) -> tuple[int, int] | None:
    """What sparse gradients must have in common to be read at once; None for strided ones."""
    if grad.layout != torch.sparse_coo:
        return None
    return grad.sparse_dim(), grad.shape[grad.sparse_dim() :].numel()


def _moment_dtype(p: Tensor) -> torch.dtype:
    """The dtype of p's moments: its own, but float32 for half precision."""
    return torch.promote_types(p.dtype, torch.float32)


def _check_state(p: Tensor, state: dict[str, Any], dense: bool) -> None:
    """Raise ValueError where a saved state is not p's: later writes go where its indices say."""
    supports = [] if dense else [state["grad_indices"], state["indices"]]
    moments = [state["exp_avg"], state["exp_avg_sq"]]
    shape = p.shape if dense else state["indices"].shape
    good = (
        all(x.layout == torch.strided and not x.is_meta for x in state.values())
        and all(m.shape == shape and m.is_floating_point() for m in moments)
        and all(s.dim() == 1 and s.dtype == torch.int64 and len(s) > 0 for s in supports)
        and all(s.min() >= 0 and s.max() < p.numel() for s in supports)
        and all(len(s.unique()) == len(s) for s in supports)
        and state["step"].numel() == 1
        and state["step"].is_floating_point()
        and 0 <= state["step"].item() < float("inf")
    )
    if not good:
        raise ValueError(f"the saved state is not that of a tensor of shape {tuple(p.shape)}")


def _check(group: dict[str, Any]) -> None:
    """Raise ValueError where a setting of a group is outside its range."""
    if not group["lr"] >= 0:
        raise ValueError(f"lr must be 0 or more, not {group['lr']}")
    if not group["eps"] >= 0:
        raise ValueError(f"eps must be 0 or more, not {group['eps']}")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be two numbers in [0, 1), not {group['betas']!r}")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay must be 0 or more, not {group['weight_decay']}")
    if not 0 < group["density_ratio"] <= 1:
        raise ValueError(f"density_ratio must be in (0, 1], not {group['density_ratio']}")
    if not isinstance(group["T"], int) or isinstance(group["T"], bool) or group["T"] < 1:
        raise ValueError(f"T must be a whole number of steps, 1 or more, not {group['T']!r}")
    if not (group["dense"] is None or isinstance(group["dense"], bool)):
        raise ValueError(f"dense must be True, False or None, not {group['dense']!r}")
    if group["seed"] is not None and not hasattr(group["seed"], "__index__"):
        raise ValueError(f"seed must be a whole number or None, not {group['seed']!r}")
    for p in group.get("params", ()):
        if p.is_complex():
            raise ValueError(f"a parameter of shape {tuple(p.shape)} is complex, not real")
