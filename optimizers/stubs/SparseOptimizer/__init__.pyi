"""Types of the installed module, which as a single file cannot carry py.typed (PEP 561)."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

__all__ = ["SO"]
__version__: str

class SO(Optimizer):
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
    ) -> None: ...
    def draw_supports(self, filter_fn: Callable[..., bool] = lambda p: p.requires_grad) -> None: ...
