"""Types of the installed module, which as a single file cannot carry py.typed (PEP 561)."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim.optimizer import Optimizer

__all__ = ["SampledGradients", "sample_gradients", "sum_gradients"]

def sample_gradients(
    model: nn.Module, optimizer: Optimizer, process_group: ProcessGroup | None = None
) -> SampledGradients: ...

class SampledGradients:
    params: list[Tensor]
    dense: dict[str, str]

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, process_group: ProcessGroup | None = None
    ) -> None: ...
    def remove(self) -> None: ...

def sum_gradients(
    params: Iterable[Tensor],
    process_group: ProcessGroup | None = None,
    average: bool = False,
    extra: Iterable[Tensor] = (),
) -> None: ...
