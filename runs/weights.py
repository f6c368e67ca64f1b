"""The weights that a run begins with, and those that it saved."""

import io
from contextlib import redirect_stderr
from pathlib import Path

import torch
from torch import Tensor

import clip
from clip import CLIP
from optimizers.delta import apply_delta, interpolate_weights_, read_delta, state_dict_sha256


class PretrainedModel:
    """The weights that a run begins with. They are read again when needed, and not kept in memory.

    Args:
        name: Name or path for `clip.load`; `activation` and `heads` likewise.

    Attributes:
        sha256: `state_dict_sha256` of the model that `load` returned.
    """

    def __init__(
        self, name: str, activation: str | None = None, heads: tuple[int, int] | None = None
    ) -> None:
        self.name, self.options, self.sha256 = name, dict(activation=activation, heads=heads), ""

    def load(self, device: torch.device) -> CLIP:
        """Return the model, to be trained."""
        model, _ = clip.load(self.name, device, **self.options)
        self.sha256 = state_dict_sha256(model)
        return model

    def reload_state_dict(self) -> dict[str, Tensor]:
        """Return the weights before training, on the CPU.

        Raises:
            ValueError: The file has changed since `load`, or is gone.
        """
        try:
            # `load` printed the notes, and loading must not move the generators of the run.
            with redirect_stderr(io.StringIO()), torch.random.fork_rng(devices=[]):
                state = clip.load(self.name, "cpu", **self.options)[0].state_dict()
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.name} changed during this run ({error})") from error
        if state_dict_sha256(state) != self.sha256:
            raise ValueError(f"{self.name} changed during this run: restore it, and --resume")
        return state


def load_weights(model: CLIP, path: Path, backbone: str, alpha: float = 1) -> None:
    """Load trained weights into their base model: a delta, or a whole state dict.

    Args:
        model: The base.
        path: The file; `.safetensors` is a delta.
        backbone: The base's name, for error messages.
        alpha: Factor of the difference to the base (`interpolate_weights_`).

    Raises:
        ValueError: The weights belong to another model, or the file is damaged.
    """
    base = {name: p.detach().clone() for name, p in model.named_parameters() if alpha != 1}
    if path.suffix == ".safetensors":
        apply_delta(model, read_delta(path))
    else:
        try:
            model.load_state_dict(clip.build_model(clip.read_checkpoint(path)).state_dict())
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{path} does not hold weights of {backbone}: {reason}") from error
    interpolate_weights_({name: model.get_parameter(name) for name in base}, base, alpha)
