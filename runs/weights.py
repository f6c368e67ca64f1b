"""The weights of a run: pretrained, trained, interpolated between the two, saved."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

import clip
from clip import CLIP
from clip.loading import resolve_checkpoint
from clip.lora import merged_lora
from optimizers.delta import (
    Delta,
    apply_delta,
    interpolate_weights_,
    interpolated_weights,
    read_delta,
    state_dict_sha256,
)
from runs.records import Run, read_run
from utils import atomic_write, sha256_of_tree


@dataclass
class PretrainedModel:
    """The weights that a run begins with; name, activation and heads are those of `clip.load`."""

    name: str
    activation: str | None = None
    heads: tuple[int, int] | None = None
    sha256: str = ""  # `state_dict_sha256` of the model that `load` returned
    model_sha256: str = ""  # of that and of what the weights do not tell, `model.settings`
    weights: dict[str, Tensor] = field(default_factory=dict)  # those that are trained, on the CPU

    def load(self, device: torch.device) -> CLIP:
        """Return the model, to be trained."""
        model, _ = clip.load(self.name, device, activation=self.activation, heads=self.heads)
        self.sha256 = state_dict_sha256(model)
        self.model_sha256 = sha256_of_tree([self.sha256, *model.settings])
        return model

    def copy_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights into `weights` before they are trained."""
        self.weights = {name: weight.detach().cpu().clone() for name, weight in weights.items()}


def load_weights(model: CLIP, path: Path, alpha: float = 1) -> None:
    """Load trained weights into their base: a delta (.safetensors), or a whole state dict.

    Their difference to the base is scaled by alpha (`interpolate_weights_`). A damaged file, or
    one of another model, is a ValueError.
    """
    base = {name: p.detach().clone() for name, p in model.named_parameters() if alpha != 1}
    if path.suffix == ".safetensors":
        apply_delta(model, read_delta(path))
    else:
        try:
            model.load_state_dict(clip.build_model(clip.read_checkpoint(path)).state_dict())
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{path} does not hold weights of this model: {error}") from error
    interpolate_weights_({name: model.get_parameter(name) for name in base}, base, alpha)


def find_saved_run(folder: Path) -> tuple[Run, Path]:
    """Read a finished run, which must have saved its weights; return it and their path."""
    if not (folder / "result.json").is_file():
        raise ValueError(f"{folder} has no result.json: name the folder that main.py printed")
    try:
        run = read_run(folder)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return run, find_weights(folder)


def find_weights(folder: Path) -> Path:
    """Return the path of a run's weights; a ValueError where there are none."""
    weights = sorted(folder.glob("*.safetensors"), key=lambda path: path.stem != "weights")
    if not weights:
        raise ValueError(
            f"{folder} has no weights: run main.py again with --overwrite --save_weights"
        )
    return weights[0]


def load_run_model(run: Run, weights: Path, device: torch.device) -> CLIP:
    """Load the backbone of a run with the weights that it saved."""
    options = {key: run.config.get(key) for key in ("activation", "heads")}
    model, _ = clip.load(run.config["backbone"], device, **options)
    load_weights(model, weights)
    return model


def resolve_base(delta: Delta, base: str | None = None) -> Path:
    """Return the checkpoint that a delta belongs to: `base`, or the one in its metadata."""
    try:
        path, _ = resolve_checkpoint(base or delta.metadata.get("backbone", "unnamed"))
        return path
    except (ValueError, OSError) as error:
        raise ValueError(f"the base of {delta.path} is not here ({error}): give --base") from error


def save_state_dict(path: Path, state: dict[str, Tensor]) -> None:
    """Write a state dict atomically: as safetensors if the path ends so, else by torch.save."""
    tensors = {  # cloned, because a view would be saved with all of its storage
        key: tensor.detach().clone(memory_format=torch.contiguous_format)
        for key, tensor in state.items()
        if isinstance(tensor, Tensor)
    }
    if path.suffix.lower() == ".safetensors":
        return atomic_write(path, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    atomic_write(path, lambda file: torch.save(tensors, file))


@contextmanager
def evaluation_weights(
    model: nn.Module, weights: Mapping[str, Tensor], pretrained: PretrainedModel, alpha: float
) -> Iterator[None]:
    """Within this context, the model has the weights that are evaluated and saved.

    LoRA's adapters are merged, and what was learned is scaled by alpha: --wise, or 0 for the
    pretrained weights.
    """
    scaled = weights if alpha != 1 else {}
    with merged_lora(model), interpolated_weights(scaled, pretrained.weights, alpha):
        yield
