"""All that continues an interrupted run: checkpoint.pt, written and read.

It holds how the trained tensors differ from the backbone's, the optimizer's state, how far
training is, and the generators' states; and the configuration and the images that it belongs to.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip.archive import safe_load
from optimizers.delta import apply_state_diff, diff_state_dict
from run_utils import Config
from runs.output_dir import diff_configs, get_hparams
from train import Adapted, TrainState
from utils import atomic_write, sha256_of_tree

VERSION = 3  # of checkpoint.pt
DISCARD_HINT = "remove it, or give --overwrite, to start anew"


class CheckpointSaver:
    """checkpoint.pt in a run's folder.

    Args:
        folder: The run's folder.
        config: Its configuration.
        data: Its images, as FewShotDataset.data.
        base: Digest of the weights that it begins with.
    """

    def __init__(self, folder: Path, config: Config, data: dict[str, Any], base: str) -> None:
        self.path = folder / "checkpoint.pt"
        self.config, self.data, self.base = config, data, base
        self.kept = ""  # what a later run would go on from, in words

    def save(self, adapted: Adapted, course: TrainState) -> None:
        """Write it: plain values and tensors, which need no trust to be read.

        Where that fails, as on a full disk, a note says so: the run is worth more, and the
        checkpoint before stays.
        """
        device = adapted.model.text_projection.device
        try:
            content = {
                "version": VERSION,
                "config": get_hparams(self.config),
                "data": self.data,
                "base": self.base,
                "trained": diff_state_dict(
                    adapted.method.trained, adapted.base.reload_state_dict()
                ),
                "optimizer": adapted.method.optimizer.state_dict(),
                "course": course.state(),
                "generators": get_rng_state(device),
            }
            content["digest"] = sha256_of_tree(content)
            atomic_write(self.path, lambda file: torch.save(content, file))
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: torch's, of full disks
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            print(f"note: {self.path} could not be written ({reason})", file=sys.stderr)
        else:
            self.kept = f"--resume goes on from iteration {course.count}, kept in {self.path}"

    def read(self) -> dict[str, Any] | None:
        """Read it, where --resume asks for that and there is one.

        Raises:
            ValueError: It is damaged, or belongs to another version, configuration, data or
                backbone; or it is this very run's, and --resume was not given.
        """
        config = self.config
        if not self.path.exists() or (config.overwrite and not config.resume):
            return None
        try:
            content = self._checked()
        except ValueError:
            if config.overwrite:
                return None
            raise
        if not config.resume:
            raise ValueError(
                f"{self.path} holds this run at iteration {content['course']['count']} of "
                f"{content['course']['iterations']}: --resume goes on from there, --overwrite "
                "starts anew"
            )
        return content

    def _checked(self) -> dict[str, Any]:
        """What the file holds, if that belongs to this very run."""
        try:
            content = safe_load(self.path)  # as torch.load with weights_only, but safe in old ones
            version = content["version"]
            whole = content.pop("digest") == sha256_of_tree(content)
        except Exception as error:  # damage shows in many ways
            reason = (str(error).splitlines() or [repr(error)])[0][:160]
            raise ValueError(f"{self.path} is damaged ({reason}); {DISCARD_HINT}") from None
        if version != VERSION:
            raise ValueError(
                f"{self.path} was written by another version of this software (its format is "
                f"{version!r}, not {VERSION}); {DISCARD_HINT}"
            )
        if not whole:
            raise ValueError(f"{self.path} is damaged (its digest does not match); {DISCARD_HINT}")
        if changes := diff_configs(content["config"], content["data"], self.config, self.data):
            raise ValueError(
                f"{self.path} belongs to another run ({changes}); give another --save_path, or "
                "--overwrite to replace it"
            )
        if content["base"] != self.base:
            raise ValueError(
                f"{self.path} belongs to other weights than {self.config.backbone} has now; "
                f"{DISCARD_HINT}"
            )
        return content

    def resume(self, content: dict[str, Any], adapted: Adapted, course: TrainState) -> None:
        """Bring a run that has just begun to where `read` found the interrupted one."""
        base = adapted.model.state_dict()  # as long as nothing is trained
        apply_state_diff(content["trained"], adapted.method.trained, base)
        adapted.method.optimizer.load_state_dict(content["optimizer"])
        course.load(content["course"])
        set_rng_state(content["generators"], adapted.model.text_projection.device)


def get_rng_state(device: torch.device) -> list[Tensor]:
    """States of torch's generators that a run may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_rng_state(states: list[Tensor], device: torch.device) -> None:
    """Restore the states that `get_rng_state` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
