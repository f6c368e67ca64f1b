"""Read a checkpoint of any format into a state dict, and find it in a folder."""

import re
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clip.archive import safe_load
from clip.convert import convert_to_openai, extract_state_dict
from utils import detect_placeholder_file, one_line, truncate_list

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")
WEIGHT_FILENAMES = (  # the names that open_clip and transformers use, the preferred first
    "model.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict of a file, in OpenAI's layout, on the CPU, in the file's precision.

    Nothing in the file is executed. Standard error names the dict and the prefix, if any, that the
    state dict was found under.

    Args:
        path: A file written by torch.save, safetensors or TorchScript.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has another format, or the model is not built like OpenAI's CLIP.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}: check the path")
    if placeholder := detect_placeholder_file(path):
        raise ValueError(f"{path} is {placeholder}")
    try:
        state_dict, note = extract_state_dict(_load_file(path))
    except Exception as error:  # damage shows in many ways, deep in zipfile, pickle and torch
        raise ValueError(
            f"{path} is not a checkpoint that can be read safely "
            f"({_format_load_error(error)}): download it again, or save only the model's "
            "state_dict() with torch.save"
        ) from None
    try:
        state_dict = convert_to_openai(state_dict)
    except (ValueError, RuntimeError) as error:  # torch's, of shapes that cannot be joined
        raise ValueError(f"{path} cannot be used: {error}") from None
    if note:
        print(f"note: {path} was read {note}", file=sys.stderr)
    return state_dict


def _load_file(path: Path) -> Any:
    """Load a file by the reader of its format."""
    if path.suffix.lower() == ".safetensors":
        return load_file(path, device="cpu")
    if zipfile.is_zipfile(path):
        return safe_load(path)
    with open(path, "rb") as file:
        if file.read(2) == b"PK":  # torch.load would try, and before 2.6 run TorchScript
            raise ValueError("it is a zip file without its end")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of old formats
        return torch.load(path, map_location="cpu", weights_only=True)


def _format_load_error(error: Exception) -> str:
    """Say why a file cannot be read, without torch's advice to load it unsafely."""
    text = one_line(str(error))
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if match := re.search(r"GLOBAL (\S+)", text):
        return f"it names {match[1]}, which is not a tensor; nothing was run"
    is_clear = isinstance(error, (ValueError, RuntimeError, SafetensorError, zipfile.BadZipFile))
    if is_clear and "weights_only" not in text:
        return text.partition(". ")[0].rstrip(".")[:160]
    return "it is not a file that torch.save wrote"


def find_weight_file(folder: Path) -> Path:
    """Find the checkpoint of a folder: under one of the usual names, or the only one."""
    for name in WEIGHT_FILENAMES:
        if (folder / name).is_file():
            return folder / name
    if shards := sorted(folder.glob("*.index.json")):
        raise ValueError(
            f"{folder} holds weights that are split into several files ({shards[0].name}): save "
            "them as one, with a larger max_shard_size"
        )
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.is_file())
    if not files:
        # The folders of the hub's cache, the Trainer and DeepSpeed have them deeper.
        deeper = {
            f.parent for depth in ("*/*", "*/*/*") for f in folder.glob(depth)
            if f.suffix.lower() in SUFFIXES and f.is_file()
        }  # fmt: skip
        if len(deeper) == 1:
            return find_weight_file(deeper.pop())
        hint = f"; name one of {truncate_list(sorted(map(str, deeper)))}" if deeper else ""
        raise FileNotFoundError(
            f"{folder} holds no checkpoint: no file ends in {', '.join(SUFFIXES)}{hint}"
        )
    if len(files) > 1:
        names = truncate_list(file.name for file in files)
        raise ValueError(f"{folder} holds several checkpoints ({names}): name one of them")
    return files[0]
