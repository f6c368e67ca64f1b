"""Read a checkpoint of any format into a state dict, and find it in a folder."""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from clip.archive import safe_load
from clip.convert import convert_to_openai, extract_state_dict
from utils import detect_placeholder_file, one_line, truncate_list

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")
WEIGHT_FILENAMES = (  # the names that open_clip and transformers use, the preferred first
    "model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "pytorch_model.bin", "open_clip_pytorch_model.bin",
)  # fmt: skip


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict of a file, in OpenAI's layout, on the CPU, in the file's precision.

    The file is one of torch.save, safetensors or TorchScript, of which nothing is executed.
    Standard error names what was removed from the names of tensors.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has another format, or the model is not built like OpenAI's CLIP.
    """
    path = Path(path)
    check_file(path)
    try:
        state_dict, note = extract_state_dict(_load_file(path))
    except Exception as error:  # damage shows in many ways, deep in zipfile, pickle and torch
        raise ValueError(
            f"{path} is not a checkpoint that can be read safely ({first_sentence(error)}): "
            "download it again, or save only the model's state_dict() with torch.save"
        ) from None
    try:
        state_dict = convert_to_openai(state_dict)
    except (ValueError, RuntimeError) as error:  # torch's, of shapes that cannot be joined
        raise ValueError(f"{path} cannot be used: {error}") from None
    if note:
        print(f"note: {path} was read {note}", file=sys.stderr)
    return state_dict


def check_file(path: Path) -> None:
    """Raise an error unless there is a file, and no placeholder of one."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}: check the path")
    if placeholder := detect_placeholder_file(path):
        raise ValueError(f"{path} is {placeholder}")


def _load_file(path: Path) -> Any:
    if path.suffix.lower() == ".safetensors":
        return load_file(path, device="cpu")
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\3\4"
    if is_zip:  # never by torch.load, which before 2.6 runs what it takes for TorchScript
        return safe_load(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of old formats
        return torch.load(path, map_location="cpu", weights_only=True)


def first_sentence(error: Exception) -> str:
    """The start of an error's message, without torch's advice to load a file unsafely."""
    return one_line(str(error) or type(error).__name__).partition(". ")[0].rstrip(".")[:200]


def find_weight_file(folder: Path) -> Path:
    """Find the checkpoint of a folder: under one of the usual names, or the only one."""
    for depth in ("", "*/", "*/*/"):  # deeper in those of the hub's cache, Trainer and DeepSpeed
        for name in (*WEIGHT_FILENAMES, "*"):
            files = sorted(folder.glob(depth + name))
            files = [file for file in files if file.suffix.lower() in SUFFIXES and file.is_file()]
            if len(files) == 1:
                return files[0]
            if files:
                names = truncate_list(str(file.relative_to(folder)) for file in files)
                raise ValueError(
                    f"{folder} holds several checkpoints ({names}): name one of them, or save the "
                    "parts of one as a single file"
                )
    raise FileNotFoundError(f"{folder} holds no checkpoint: no file ends in {', '.join(SUFFIXES)}")
