"""An optimizer and the weights that it trains, as little of both as it takes to go on from there.

SO moves none but the entries of its supports. Those that it ever drew are noted as it draws them:
neither a copy of the weights it began with is needed, nor a comparison with them. At density 5e-5
a checkpoint of ViT-B/16 is a few megabytes. Of other optimizers' tensors all is kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers.SparseOptimizer import SO


class Snapshot:
    """Takes and restores the state of an optimizer and of its tensors.

    Args:
        optimizer: Before its first step. Where it is an SO, a state is of the entries that it has
            moved since; all others must be as they are now when that state is loaded.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        # Of each tensor the supports drawn since `entries` was called, and what it then returned.
        self.noted: list[list[Tensor]] = [[] for _ in self.params]
        if isinstance(optimizer, SO):
            optimizer.register_step_post_hook(lambda *_: self._note())

    def _note(self) -> None:
        for p, noted in zip(self.params, self.noted, strict=True):
            support = self.optimizer.state[p].get("grad_indices")
            if support is not None and not (noted and noted[-1] is support):
                noted.append(support)

    def entries(self) -> list[Tensor | None]:
        """Flat positions that may have moved, increasing (c,), of each tensor; None for all."""
        for p, noted in zip(self.params, self.noted, strict=True):
            if len(noted) > 1:
                united = torch.cat([part.long() for part in noted]).unique()
                smallest = torch.int32 if p.numel() < 2**31 else torch.int64
                noted[:] = [united.to(smallest), noted[-1]]
        return [noted[0] if noted else None for noted in self.noted]

    def state(self) -> dict[str, Any]:
        """Both as plain values and CPU tensors."""
        return {"optimizer": self.optimizer.state_dict(), "weights": self.take(self.params)}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned.

        Raises:
            ValueError: It is of other tensors.
        """
        self.put(state["weights"], self.params)
        self.optimizer.load_state_dict(state["optimizer"])
        for noted, (at, _) in zip(self.noted, state["weights"], strict=True):
            noted[:] = [] if at is None else [at.to(self.params[0].device)]

    def take(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor | None, Tensor]]:
        """Read tensors of these shapes at `entries`: positions and values."""
        taken = []
        for tensor, at in zip(tensors, self.entries(), strict=True):
            values = tensor.detach() if at is None else tensor.detach().take(at.long())
            taken.append((None if at is None else at.cpu(), values.cpu()))
        return taken

    @torch.no_grad()
    def put(self, taken: Sequence[tuple[Tensor | None, Tensor]], tensors: Sequence[Tensor]) -> None:
        """Write what `take` returned into tensors.

        Raises:
            ValueError: It is of other tensors; nothing is written.
        """
        if len(taken) != len(tensors) or not all(map(_fits, taken, tensors)):
            raise ValueError("it is of other tensors")
        for (at, values), tensor in zip(taken, tensors, strict=True):
            values = values.to(tensor.device)
            if at is None:
                tensor.copy_(values)
            else:
                tensor.put_(at.to(tensor.device).long(), values)


def _fits(taken: tuple[Tensor | None, Tensor], tensor: Tensor) -> bool:
    """Whether positions and values may be written into the tensor."""
    at, values = taken
    if values.dtype != tensor.dtype or not values.isfinite().all():
        return False
    if at is None:
        return values.shape == tensor.shape
    good = at.dtype in (torch.int32, torch.int64) and at.dim() == 1 and at.shape == values.shape
    return good and (len(at) == 0 or 0 <= int(at.min()) <= int(at.max()) < tensor.numel())
