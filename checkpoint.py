"""All that continues an interrupted run: checkpoint.pt, written and read."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip.archive import read_saved
from results import computed, differences
from utils import atomic_write, content_digest

VERSION = 1  # of checkpoints


class Checkpoint(dict):
    """What a checkpoint holds, and the file that it is from."""

    def __init__(self, content: dict[str, Any], path: Path) -> None:
        super().__init__(content)
        self.path = path

    @contextmanager
    def usable(self) -> Iterator[None]:
        """Turn whatever goes wrong in its use into a ValueError that names the file."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = (str(error).splitlines() or [""])[0][:160]
            raise ValueError(
                f"{self.path} does not fit this run ({reason}); remove it to start anew"
            ) from error


def write_checkpoint(folder: Path, config: argparse.Namespace, **content: Any) -> None:
    """Write checkpoint.pt: plain values and tensors, which need no trust to be read.

    Where that fails, as on a full disk, a note says so: the run is worth more, and the checkpoint
    before stays.
    """
    path = folder / "checkpoint.pt"
    data = {"version": VERSION, "config": computed(config), **content}
    data["digest"] = content_digest(data)
    try:
        atomic_write(path, lambda file: torch.save(data, file))
    except (OSError, RuntimeError) as error:  # RuntimeError is how torch reports a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        print(f"note: {path} could not be written ({reason})", file=sys.stderr)


def read_checkpoint(
    folder: Path, config: argparse.Namespace, base_digest: str
) -> Checkpoint | None:
    """Read the checkpoint of this very run, if --resume asks for one and it is there.

    Raises:
        ValueError: It is damaged, or of another version, configuration or backbone.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    if not config.resume:
        print(f"note: --resume would go on from {path}; starting anew", file=sys.stderr)
        return None
    remedy = f"remove {path}, or leave --resume out, to start anew"
    try:
        data = read_saved(path)  # as torch.load with weights_only, but safe in old versions, too
        whole = data.pop("digest") == content_digest(data)
        version, there, base = data["version"], dict(data["config"]), data["base_digest"]
    except Exception as error:  # damage shows in many ways
        reason = (str(error).splitlines() or [repr(error)])[0][:160]
        raise ValueError(f"{path} is damaged ({reason}); {remedy}") from None
    if version != VERSION:
        raise ValueError(f"{path} is of version {version!r}, not {VERSION}; {remedy}")
    if not whole:
        raise ValueError(f"{path} is damaged (its digest does not match); {remedy}")
    if changes := differences(there, computed(config)):
        if config.overwrite:
            return None
        raise ValueError(
            f"{path} is of another run ({changes}); give another --save_path, or --overwrite to "
            "replace it"
        )
    if base != base_digest:
        raise ValueError(f"{path} is of a {config.backbone} of other weights; {remedy}")
    return Checkpoint(data, path)


def generator_states(device: torch.device) -> list[Tensor]:
    """States of torch's generators that a run may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_generators(states: Sequence[Tensor], device: torch.device) -> None:
    """Restore what `generator_states` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
