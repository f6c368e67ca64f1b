"""Small things several parts use: atomic files, saved weights, progress bars."""

import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import nn
from tqdm import tqdm

T = TypeVar("T")


def atomic_write(path: str | os.PathLike, data: bytes | str) -> None:
    """Write a file so that its name only ever stands for the whole content.

    The data goes to a temporary file beside it, to the disk, and is then renamed.

    Raises:
        OSError: The folder is missing, full or not writable; nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def one_line(text: str) -> str:
    """A text on one line: white space as single spaces, what cannot be printed by its code.

    The middle of a very long one is left out, for remedies stand at the end.
    """
    text = " ".join(text.split())
    if len(text) > 2000:
        text = f"{text[:1000]} ... {text[-900:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names and float32 values of all a model's weights, whatever file they are of."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().float().cpu().contiguous().numpy())
    return sha.hexdigest()


def save_weights(path: str | os.PathLike, matrices: Mapping[str, torch.Tensor], base: str) -> None:
    """Write adapted matrices as safetensors.

    Args:
        path: The file.
        matrices: Matrices by their name in the model.
        base: Digest of the weights that they were adapted from; kept as metadata `base_digest`.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in matrices.items()}
    atomic_write(path, safetensors.torch.save(tensors, metadata={"base_digest": base}))


def load_weights(path: str | os.PathLike, model: nn.Module) -> None:
    """Put saved matrices into the model that they were adapted from.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or belongs to other weights than the model's.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there are no weights at {path}: run with --save_weights first")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            base = (file.metadata() or {}).get("base_digest")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): save it again") from error
    if base != weights_digest(model):
        raise ValueError(f"{path} belongs to other weights than these: name its --backbone")
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ValueError(f"{path} holds {name} {tuple(tensor.shape)}, which the model does not")
        with torch.no_grad():
            parameters[name].copy_(tensor)


def progress(
    items: Iterable[T], total: int | None = None, desc: str = "", unit: str = "it"
) -> Iterator[T]:
    """Yield the items, showing how far along they are on standard error.

    A terminal gets tqdm's bar; a file or a pipe a plain line now and then (`Progress`).
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with Progress(total, desc, unit) as bar:
        for item in items:
            yield item
            bar.update()


class Progress:
    """A bar on a terminal, else a plain line at most every `seconds`.

    Args:
        total: How many units there will be; None when unknown.
        desc: What is being done.
        unit: What is counted.
        seconds: Least time between two plain lines.
    """

    def __init__(
        self, total: int | None, desc: str = "", unit: str = "it", seconds: float = 15.0
    ) -> None:
        self.total, self.desc, self.unit, self.seconds = total, desc, unit, seconds
        self.count, self.note = 0, ""
        self.start = self.last = time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, desc=desc, unit=unit, dynamic_ncols=True, leave=False)

    def update(self, n: int = 1, note: str = "") -> None:
        """Count n more units; `note` (such as the loss) is shown behind the count."""
        self.count += n
        self.note = note or self.note
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(n)
        elif time.monotonic() - self.last >= self.seconds:
            self._line()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.last > self.start:  # what took no longer than one line's interval stays silent
            self._line()

    def _line(self) -> None:
        """Print one plain line: what, how many of how many, rate, note."""
        self.last = time.monotonic()
        rate = self.count / max(self.last - self.start, 1e-9)
        of = f"/{self.total}" if self.total is not None else ""
        note = f", {self.note}" if self.note else ""
        print(
            f"{self.desc}: {self.count}{of} {self.unit}, {rate:.1f} {self.unit}/s{note}",
            file=sys.stderr,
            flush=True,
        )
