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
from collections.abc import Callable, Iterable
from typing import Any

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
    """Update the moments on the union of both supports, for N tensors at once.

    The union's size depends on the data; to need no synchronisation on a GPU it always has k + l
    slots, and an entry of both supports fills two neighbouring slots with the same values.

    Args:
        indices: S_m, (N, k).
        grad_indices: S_g, (N, l).
        exp_avg: m at S_m, (N, k).
        exp_avg_sq: v at S_m, (N, k).
        grad: g at S_g, (N, l).
        beta1: Decay of m.
        beta2: Decay of v.

    Returns:
        The union's indices, m and v there, and which slots repeat the one before: (N, k + l) each.
    """
    union, order = torch.cat([indices, grad_indices], dim=-1).sort(dim=-1)
    m = torch.cat([beta1 * exp_avg, (1 - beta1) * grad], dim=-1).gather(-1, order)
    v = torch.cat([beta2 * exp_avg_sq, (1 - beta2) * grad.square()], dim=-1).gather(-1, order)
    repeats = torch.zeros_like(union, dtype=torch.bool)
    repeats[:, 1:] = union[:, 1:] == union[:, :-1]
    for moment in (m, v):  # on S_m and S_g both: the decayed moment plus the new part
        both = moment[:, 1:] + moment[:, :-1]
        moment[:, 1:] = both.where(repeats[:, 1:], moment[:, 1:])
        moment[:, :-1] = both.where(repeats[:, 1:], moment[:, :-1])
    return union, m, v, repeats


def largest(m: Tensor, repeats: Tensor, k: int) -> Tensor:
    """Slots of the k largest |m| in each row of m (N, slots), no entry twice: (N, k) int64."""
    return m.abs().masked_fill_(repeats, -1).topk(k, dim=-1, sorted=False).indices


def read_gradient(grad: Tensor, indices: Tensor) -> Tensor:
    """Read a strided or sparse COO gradient at flat indices (k,), in increasing order: (k,)."""
    if grad.layout != torch.sparse_coo:
        return grad.take(indices)  # flat, row-major, whatever the strides
    positions, values = grad._indices(), grad._values()  # (d, nnz), (nnz, ...); may repeat
    flat = positions.new_zeros(positions.shape[1])
    for position, size in zip(positions, grad.shape, strict=False):
        flat = flat * size + position
    row = grad.shape[positions.shape[0] :].numel()  # 1, or more where whole rows are listed
    flat = (flat[:, None] * row + torch.arange(row, device=flat.device)).view(-1)
    slot = torch.searchsorted(indices, flat).clamp_(max=len(indices) - 1)
    found = values.reshape(-1).where(indices[slot] == flat, 0)
    return found.new_zeros(indices.shape).index_add_(0, slot, found)


def write(tensor: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write values (k,) into a strided tensor's own storage at flat (row-major) indices (k,)."""
    if tensor.is_contiguous():
        tensor.view(-1).scatter_(0, indices, values)
    else:
        tensor.index_put_(torch.unravel_index(indices, tensor.shape), values)


class SO(Optimizer):
    """Adam on a sparse, moving support of each tensor; see the module's docstring.

    State, per tensor: `step` (t); of sparse ones also `grad_indices` (S_g), `indices` (S_m),
    `exp_avg` (m) and `exp_avg_sq` (v), of k entries each, the moments in float32 or better.
    Settings are in `param_groups`, `seed` included: a state dict continues bit for bit.

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
        self._draw(only_with_gradient=True)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            self._dense_update([p for p in params if _is_dense(p, group)], group)
            alike = defaultdict(list)  # by what lets tensors be the rows of one update
            for p in params:
                if not _is_dense(p, group):
                    state = self.state[p]
                    state["step"] += 1
                    sizes = len(state["indices"]), len(state["grad_indices"])
                    alike[state["step"].item(), sizes, p.dtype, p.device].append(p)
            for (step, *_), rows in alike.items():
                self._sparse_update(rows, group, step)
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
        """Load what `state_dict` returned, also where parameters had another precision."""
        super().load_state_dict(state_dict)
        # Torch has cast all state to the parameters' dtype, indices included: read it once more.
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

    def _resolve_seeds(self) -> None:
        """Give each group that was told no seed one from torch's global generator."""
        for group in self.param_groups:
            if group["seed"] is None:
                group["seed"] = int(torch.randint(2**62, (), device="cpu"))

    def _draw(self, only_with_gradient: bool) -> None:
        """Draw where a window of T steps begins, and start the state of new tensors."""
        self._resolve_seeds()
        generator = torch.Generator("cpu")
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
                # save, and it is the same on every device. The copy to a GPU waits for nothing.
                key = f"{group['seed']} {position} {step}".encode()
                generator.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big"))
                k = max(1, int(p.numel() * group["density_ratio"]))
                support = draw_support(p.numel(), k, generator).to(p.device, non_blocking=True)
                state["grad_indices"] = support
                self._drawn.add(p)
                if "indices" not in state:
                    zeros = torch.zeros(k, dtype=_moment_dtype(p), device=p.device)
                    state["step"] = torch.zeros((), device="cpu")
                    state["indices"] = support.clone()  # S_m = S_g at t = 1
                    state["exp_avg"], state["exp_avg_sq"] = zeros, zeros.clone()

    def _sparse_update(self, params: list[Tensor], group: dict[str, Any], step: float) -> None:
        """Update tensors of equal support sizes, dtype, device and step: one row each."""
        states = [self.state[p] for p in params]
        indices, grad_indices, exp_avg, exp_avg_sq = (
            torch.stack([state[name] for state in states])
            for name in ("indices", "grad_indices", "exp_avg", "exp_avg_sq")
        )
        rows = zip(params, grad_indices, strict=True)
        grad = torch.stack([read_gradient(p.grad, at) for p, at in rows]).to(exp_avg.dtype)
        if group["weight_decay"] != 0:
            rows = zip(params, grad_indices, strict=True)
            weight = torch.stack([p.take(at) for p, at in rows])
            grad = grad + group["weight_decay"] * weight.to(exp_avg.dtype)

        beta1, beta2 = group["betas"]
        union, m, v, repeats = merge_supports(
            indices, grad_indices, exp_avg, exp_avg_sq, grad, beta1, beta2
        )
        denominator = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = group["lr"] / (1 - beta1**step) * m / denominator
        weight = torch.stack([p.take(at) for p, at in zip(params, union, strict=True)])
        weight = (weight.to(m.dtype) - update).to(weight.dtype)
        for p, at, values in zip(params, union, weight, strict=True):
            write(p, at, values)

        keep = largest(m, repeats, grad_indices.shape[-1])
        for name, values in (("indices", union), ("exp_avg", m), ("exp_avg_sq", v)):
            for state, row in zip(states, values.gather(-1, keep), strict=True):
                state[name] = row.clone()  # not a view, which would keep all rows alive

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


def _moment_dtype(p: Tensor) -> torch.dtype:
    """The dtype of p's moments: its own, but float32 for half precision."""
    return torch.promote_types(p.dtype, torch.float32)


def _check(group: dict[str, Any]) -> None:
    """Raise ValueError where a setting of a group is outside its range."""
    if not group["lr"] >= 0:
        raise ValueError(f"lr must be 0 or more, not {group['lr']}")
    if not group["eps"] >= 0:
        raise ValueError(f"eps must be 0 or more, not {group['eps']}")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must be two numbers in [0, 1), not {group['betas']}")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay must be 0 or more, not {group['weight_decay']}")
    if not 0 < group["density_ratio"] <= 1:
        raise ValueError(f"density_ratio must be in (0, 1], not {group['density_ratio']}")
    if not isinstance(group["T"], int) or isinstance(group["T"], bool) or group["T"] < 1:
        raise ValueError(f"T must be a whole number of steps, 1 or more, not {group['T']!r}")
    if group["dense"] not in (None, True, False):
        raise ValueError(f"dense must be True, False or None, not {group['dense']!r}")
    for p in group.get("params", ()):
        if p.is_complex():
            raise ValueError(f"a parameter of shape {tuple(p.shape)} is complex, not real")
