"""SO with one of its parts made otherwise, for ablations.

SO reads gradients at random entries (local randomness) and keeps moments where they are largest
(global importance). Each support may be chosen otherwise here; "redrawn or not" is T: one support
for good is a T of more steps than there are.

So may the moments. SO's bias corrections count from a tensor's first step, so an entry that enters
its support late, when both are 1, begins with m = (1 - b1) g and v = (1 - b2) g^2, and moves by

    lr * (1 - b1) / sqrt(1 - b2) * sign(g)  =  3.16 lr sign(g)  at the usual betas,

whatever the gradient's size. Corrections by each entry's own steps make that first move
lr * sign(g). Without moments, every move at S_g is the one above: signSGD (Bernstein et al. 2018,
arXiv 1802.04434) on a random support.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from optimizers.SparseOptimizer import SO

GRAD_SUPPORTS = ("random", "magnitude")
MOMENT_SUPPORTS = ("magnitude", "random", "fixed", "reset")
MOMENTS = ("adam", "none")


class SOVariant(SO):
    """SO with other supports or moments; see there for all else.

    Args:
        params: As SO's.
        grad_support: S_g is "random", or the k entries of largest "magnitude" of the gradient,
            which must then be whole, on the steps that draw.
        moment_support: S_m is the k entries of the union with the largest "magnitude" of m,
            "random" ones of it, "fixed", the first S_g for good, or "reset": always S_g, with all
            moments forgotten where it is drawn.
        moments: "adam" or "none": see the module's docstring. Without moments they stay 0.
        **settings: SO's.

    Raises:
        ValueError: There are no moments to choose a support for or to correct.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        grad_support: str = "random",
        moment_support: str = "magnitude",
        moments: str = "adam",
        **settings: Any,
    ) -> None:
        correction = settings.get("bias_correction", "tensor")
        if moments == "none" and (moment_support, correction) != ("magnitude", "tensor"):
            raise ValueError(
                "without moments there is no support of them to choose, and no bias to correct: "
                "leave out moment_support and bias_correction, or moments"
            )
        self.grad_support, self.moment_support, self.moments = grad_support, moment_support, moments
        super().__init__(params, **settings)

    def __getstate__(self) -> dict[str, Any]:  # of which torch keeps groups and state only
        names = ("grad_support", "moment_support", "moments")
        return super().__getstate__() | {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def draw_supports(self, filter_fn: Callable[..., bool] = lambda p: p.requires_grad) -> None:
        """As SO's; the largest entries of a gradient can be known once it is there."""
        ready = set(self._ready)
        super().draw_supports(filter_fn)
        for p in self._ready - ready:
            state = self.state[p]
            if self.grad_support == "magnitude":
                k = len(state["grad_indices"])
                state["grad_indices"] = p.grad.abs().flatten().topk(k).indices.sort().values
            if self.moment_support == "reset" or not state["step"]:
                state["indices"] = state["grad_indices"].clone()
                for name in state.keys() & {"exp_avg", "exp_avg_sq", "entry_steps"}:
                    state[name] = torch.zeros_like(state[name])

    def _sparse_update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if self.moments == "none":
            return self._signsgd_update(params, group)
        # Of seed and step, so that there is no generator to save; the same for each chunk.
        seed = hash((group["seed"], int(self.state[params[0]]["step"]))) % 2**63
        self._scores = torch.Generator("cpu").manual_seed(seed)
        super()._sparse_update(params, group)
        del self._scores

    def _signsgd_update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Take the step without moments on many tensors at once."""
        beta1, beta2 = group["betas"]
        move = -group["lr"] * (1 - beta1) / math.sqrt(1 - beta2)
        updates = []
        for p, g in zip(params, self._read_gradients(params, group), strict=True):
            void = torch.zeros_like(g, dtype=torch.bool)
            updates.append((self.state[p]["grad_indices"], move * g.sign(), void))
        self._add(params, updates, group)

    def _score(self, U: Tensor, m: Tensor, S_m: Tensor) -> Tensor:
        if self.moment_support == "random":
            scores = torch.rand(m.shape, generator=self._scores, dtype=m.dtype, device="cpu")
            return scores.to(m.device)
        if self.moment_support == "fixed":
            return torch.isin(U, S_m).to(m.dtype)
        return m.abs()
