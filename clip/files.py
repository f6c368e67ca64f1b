"""Reads checkpoints from files without running anything in them, and finds them in folders."""

import re
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clip.archive import check_expansion_ratio, is_archive, read_torchscript_state_dict, safe_load
from clip.convert import convert_to_openai, extract_state_dict
from utils import detect_placeholder_file

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")
WEIGHT_FILENAMES = (  # what makers call their files, in the order in which a folder's are taken
    "model.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


def find_weight_file(folder: Path) -> Path:
    """The checkpoint in a folder: under a name that makers give it, or the only one.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if there are several, or one that is split into several files.
    """
    for name in WEIGHT_FILENAMES:
        if (folder / name).is_file():
            return folder / name
    if split := sorted(folder.glob("*.index.json")):
        raise ValueError(
            f"{folder} holds weights that are split into several files ({split[0].name}): save "
            "them as one, with a larger max_shard_size"
        )
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.is_file())
    if len(files) == 1:
        return files[0]
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint: neither {', '.join(WEIGHT_FILENAMES)} nor any other of "
            f"{', '.join(SUFFIXES)}"
        )
    raise ValueError(
        f"{folder} holds several checkpoints ({', '.join(f.name for f in files[:3])}"
        f"{' ...' if len(files) > 3 else ''}): name one of them"
    )


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, in OpenAI's layout, on the CPU, in the precision it was saved in.

    Where it lies within dicts or below a prefix, standard error says so.

    Args:
        path: a file written by torch.save, safetensors or TorchScript.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as any of these, in which nothing is executed; or if its
            model is built otherwise than OpenAI's CLIP.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}: check the path")
    if what := detect_placeholder_file(path):
        raise ValueError(f"{path} is {what}")
    try:
        found = extract_state_dict(_read(path))
        check_expansion_ratio(path, sum(map(_bytes, found.state.values())) if found else 0)
    except Exception as error:  # damage shows in many ways, deep in zipfile, pickle and torch
        raise ValueError(
            f"{path} is not a checkpoint that can be read safely ({_reason(path, error)}): get it "
            "again, or save the model's state_dict() alone with torch.save"
        ) from None
    if found is None:
        raise ValueError(
            f"{path} holds no state dict: save the model's state_dict() with torch.save"
        )
    try:
        state = convert_to_openai(found.state)
    except (ValueError, RuntimeError) as error:  # torch's own, of shapes that cannot be joined
        raise ValueError(f"{path} cannot be used: {error}") from None
    if found.where:
        print(f"note: {path} was read {found.where}", file=sys.stderr)
    return state


def _bytes(value: Any) -> int:
    """Memory of a tensor once it is copied, however little of it is stored; 0 for other things."""
    if not isinstance(value, Tensor):
        return 0
    plain = value.layout == torch.strided and value.device.type == "cpu"
    if not plain or value.is_quantized or value.is_complex():
        raise ValueError("it holds a tensor that is not of plain numbers")
    return value.numel() * value.element_size()


def _read(path: Path) -> Any:
    """What a file holds, by the reader that its format needs."""
    if path.suffix.lower() == ".safetensors":
        return load_file(path, device="cpu")
    if is_archive(path):
        return read_torchscript_state_dict(path)
    if zipfile.is_zipfile(path):
        return safe_load(path, placeholders=True)
    # torch.load would unpack archives of its own accord: a zip file by its beginning, and run it
    # where it takes it for TorchScript (2.5 and older), or a tar file.
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            raise ValueError("its end is missing")
    if tarfile.is_tarfile(path):
        raise ValueError("it is a tar file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of old formats
        return torch.load(path, map_location="cpu", weights_only=True)


def _reason(path: Path, error: Exception) -> str:
    """Why a file cannot be read, without torch's advice to read it unsafely."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    if not path.stat().st_size:
        return "it is empty"
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it names {named[1]}, which is not a tensor; nothing was run"
    known = isinstance(error, (ValueError, RuntimeError, SafetensorError, zipfile.BadZipFile))
    if known and "weights_only" not in text:
        return text.partition(". ")[0].rstrip(".")[:160]
    return "it is not a file that torch.save wrote"
