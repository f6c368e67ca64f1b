"""SO with one of its two supports chosen otherwise, for the paper's ablation.

SO reads gradients at random entries (local randomness) and keeps moments where they are largest
(global importance). Each may be turned around here; "redrawn or not" is T: one support for good is
a T of more steps than there are.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from optimizers.SparseOptimizer import SO

GRAD_SUPPORTS = ("random", "magnitude")
MOMENT_SUPPORTS = ("magnitude", "random", "fixed")


class AblatedSO(SO):
    """SO with other supports; see there for all else.

    Args:
        params: As SO's.
        grad_support: S_g is "random", or the k entries of largest "magnitude" of the gradient,
            which must then be whole, on the steps that draw.
        moment_support: S_m is the k entries of the union with the largest "magnitude" of m,
            "random" ones of it, or "fixed": the first S_g for good.
        **settings: SO's.

    Raises:
        ValueError: A name is none of these, or SO refuses its arguments.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        grad_support: str = "random",
        moment_support: str = "magnitude",
        **settings: Any,
    ) -> None:
        for name, valid in ((grad_support, GRAD_SUPPORTS), (moment_support, MOMENT_SUPPORTS)):
            if name not in valid:
                raise ValueError(f"unknown support {name!r}; valid: {', '.join(valid)}")
        self.grad_support, self.moment_support = grad_support, moment_support
        super().__init__(params, **settings)

    @torch.no_grad()
    def draw_supports(self, wanted: Callable[[Tensor], bool] | None = None) -> None:
        """As SO's; the largest entries of a gradient can be known once it is there."""
        drawn = set(self._drawn)
        super().draw_supports(wanted)
        if self.grad_support == "random":
            return
        for p in self._drawn - drawn:
            state = self.state[p]
            k = len(state["grad_indices"])
            state["grad_indices"] = p.grad.abs().flatten().topk(k).indices.sort().values
            if not state["step"]:
                state["indices"] = state["grad_indices"].clone()

    def _sparse_update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        # Like the draws of S_g a function of seed and step: there is no generator to save.
        seed = hash((group["seed"], int(self.state[params[0]]["step"]))) % 2**63
        self._scores = torch.Generator("cpu").manual_seed(seed)
        super()._sparse_update(params, group)
        del self._scores

    def _importance(self, U: Tensor, m: Tensor, S_m: Tensor) -> Tensor:
        if self.moment_support == "random":
            scores = torch.rand(m.shape, generator=self._scores, dtype=m.dtype, device="cpu")
            return scores.to(m.device)
        if self.moment_support == "fixed":
            return torch.isin(U, S_m).to(m.dtype)
        return super()._importance(U, m, S_m)
