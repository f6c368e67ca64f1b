"""An optimizer and the weights that it trains, as little of both as it takes to go on from there.

SO moves none but the entries of its supports. Those that it ever drew are noted as it draws them,
one bit for each entry of the tensors: neither a copy of the weights it began with is needed, nor a
comparison with them. At density 5e-5 a checkpoint of ViT-B/16 is a few megabytes. Of other
optimizers' tensors all is kept.
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
        self.noted: list[Tensor | None] = [None] * len(self.params)  # each tensor's latest support
        self.moved: list[Tensor | None] = [None] * len(self.params)  # and all of them, as bits
        if isinstance(optimizer, SO):
            optimizer.register_step_post_hook(lambda *_: self._note())

    def _note(self) -> None:
        for index, p in enumerate(self.params):
            support = self.optimizer.state[p].get("grad_indices")
            if support is not None and support is not self.noted[index]:
                self.noted[index] = support
                self._mark(index, support)

    def _mark(self, index: int, at: Tensor) -> None:
        """Set the bits of distinct positions in a tensor."""
        if self.moved[index] is None:
            self.moved[index] = at.new_zeros(-(-self.params[index].numel() // 8), dtype=torch.uint8)
        bits, byte = self.moved[index], at >> 3
        new = torch.bitwise_left_shift(1, at & 7).to(torch.uint8) & ~bits[byte]
        bits.index_add_(0, byte, new)  # of one byte several may be new: their sum is their union

    def entries(self) -> list[Tensor | None]:
        """Flat positions that may have moved, increasing (c,), of each tensor; None for all."""
        pairs = zip(self.params, self.moved, strict=True)
        return [None if bits is None else _positions(bits, p.numel()) for p, bits in pairs]

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
        self.moved = [None] * len(self.params)
        for index, (at, _) in enumerate(state["weights"]):
            if at is not None:
                self._mark(index, at.to(self.params[index].device).long())

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


def _positions(bits: Tensor, n: int) -> Tensor:
    """Where the bits of n entries are set."""
    byte = bits.nonzero().flatten()
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    row, place = (bits[byte, None] >> places & 1).nonzero(as_tuple=True)
    return (byte[row] * 8 + place).to(torch.int32 if n < 2**31 else torch.int64)


def _fits(taken: tuple[Tensor | None, Tensor], tensor: Tensor) -> bool:
    """Whether positions and values may be written into the tensor."""
    at, values = taken
    if values.dtype != tensor.dtype or not values.isfinite().all():
        return False
    if at is None:
        return values.shape == tensor.shape
    good = at.dtype in (torch.int32, torch.int64) and at.dim() == 1 and at.shape == values.shape
    if not good or len(at) == 0:
        return good
    return bool((at[1:] > at[:-1]).all()) and 0 <= int(at[0]) and int(at[-1]) < tensor.numel()
