"""checkpoint.pt: all that an interrupted run is continued from, and whose run it is."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clip.archive import safe_load
from optimizers.delta import diff_state_dict
from runs.distributed import is_main_process
from runs.identity import diff_runs
from runs.output_dir import OVERWRITE_HINT
from runs.weights import PretrainedModel
from utils import atomic_write, one_line

VERSION = 4


@dataclass
class CheckpointSaver:
    """Saves and loads the checkpoint of a run."""

    path: Path
    args: argparse.Namespace
    identity: dict[str, Any]  # from `runs.identity.get_identity`
    pretrained: PretrainedModel
    note: str = ""  # what a later run can resume from

    def save(self, trained: Mapping[str, Tensor], optimizer: Optimizer, state: Any) -> None:
        """Write the trained weights, the optimizer's state and the training's, on rank 0.

        Where that fails, as on a full disk, a note says so: the training is worth more, and the
        previous checkpoint stays.
        """
        if not is_main_process():
            return
        content = {
            "version": VERSION,
            **self.identity,
            "trained": diff_state_dict(trained, self.pretrained.weights),
            "optimizer": optimizer.state_dict(),
            "state": state.state_dict(),
        }
        try:
            atomic_write(self.path, lambda file: torch.save(content, file))
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's, of full disks
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            print(f"note: {self.path} could not be written ({reason})", file=sys.stderr)
        else:
            self.note = f"--resume continues from iteration {state.iteration}, saved in {self.path}"

    def load(self) -> dict[str, Any] | None:
        """The checkpoint to resume from, with --resume and if there is one.

        One that is damaged, of another run, or of this very run without --resume is a ValueError.
        """
        resume, overwrite = self.args.resume, self.args.overwrite
        if not self.path.exists() or (overwrite and not resume):
            return None
        try:
            content = safe_load(self.path)
            if content["version"] != VERSION:
                raise ValueError("another version of this software wrote it")
            if changes := diff_runs(content, self.identity):
                raise ValueError(f"it belongs to another run: {'; '.join(changes)}")
        except Exception as error:  # damage shows in many ways; a zip file has checksums
            if overwrite:
                print(one_line(f"note: {self.path} is not used ({error})"), file=sys.stderr)
                return None
            raise ValueError(f"{self.path} cannot be used ({error}); {OVERWRITE_HINT}") from error
        if not resume:
            state = content["state"]
            raise ValueError(
                f"{self.path} has this run at iteration {state['iteration']} of "
                f"{state['total_iters']}: --resume continues from there, --overwrite starts anew"
            )
        return content
