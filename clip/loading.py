"""Brings CLIP's weights, by name or from a file, and the preprocessing that belongs to them.

model, preprocess = load("ViT-B/16")
features = model.encode_image(preprocess(Image.open("cat.jpg")).unsqueeze(0))
"""

import difflib
import os
import re
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchvision import transforms

from .archive import check_growth, is_archive, read_archive, read_saved
from .download import cache_folder, digest, fetch
from .model import CLIP, build_model

MODELS_URL = "https://openaipublic.azureedge.net/clip/models"  # /<sha256>/<file>
OPENAI = {  # name: (file, SHA-256)
    "RN50": ("RN50.pt", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
    "RN101": ("RN101.pt", "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
    "RN50x4": ("RN50x4.pt", "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd"),
    "RN50x16": ("RN50x16.pt", "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa"),
    "RN50x64": ("RN50x64.pt", "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"),
    "ViT-B/32": ("ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": ("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": ("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": (
        "ViT-L-14-336px.pt",
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
    ),
}

WEIGHTS = Path(__file__).parent / "weights"  # what this repository ships
SHIPPED = {  # name: (file, SHA-256)
    "ViT-Tiny/8": (
        "ViT-Tiny-8.pt",
        "d3150fd4582eaba16b95b1c4cc93710ecd18a18dd240ef72a2da3206f0cf3d50",
    ),
}

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the images that CLIP was trained on, RGB
STD = (0.26862954, 0.26130258, 0.27577711)


def available_models() -> list[str]:
    """The names that `load` knows: OpenAI's nine, then what this repository ships."""
    return [*OPENAI, *SHIPPED]


def load(
    name_or_path: str | os.PathLike,
    device: str | torch.device | None = None,
    download_root: str | os.PathLike | None = None,
    *,
    activation: str | None = None,
    heads: tuple[int, int] | None = None,
) -> tuple[CLIP, transforms.Compose]:
    """Load a CLIP and the preprocessing of its images.

    Args:
        name_or_path: one of `available_models()`, or a checkpoint's path: a state dict saved by
            torch.save or as safetensors, or a TorchScript archive such as OpenAI's. Nothing in
            the file is executed.
        device: where the model goes; CUDA where there is one, otherwise the CPU.
        download_root: the folder that downloads lie in; ~/.cache/clip when None. A file that is
            there is verified, and downloaded again if it is not the one that belongs there.

    Returns:
        The model in float32 and evaluation mode, nothing frozen; and a transform that turns a
        PIL image of any size and mode into its input (3, R, R).

    Raises:
        ValueError: if the name or the device is unknown, or the file is no CLIP checkpoint.
        FileNotFoundError: if there is no such file.
        ConnectionError: if a download fails.
    """
    device = _device(device)
    path = locate(name_or_path, download_root)
    state_dict = read_checkpoint(path)
    try:
        model = build_model(state_dict)
    except (ValueError, RuntimeError) as error:  # torch's own, of sizes that it cannot have
        raise ValueError(
            f"{path} cannot be used: {error} Name a checkpoint of a CLIP such as OpenAI's."
        ) from None
    return model.to(device), make_preprocess(model.visual.input_resolution)


def _device(device: str | torch.device | None) -> torch.device:
    """The device asked for, tried before anything large is read."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise ValueError(
            f"The device {str(device)!r} cannot be used ({reason}): name another, such as cpu."
        ) from None


def locate(name_or_path: str | os.PathLike, download_root: str | os.PathLike | None) -> Path:
    """The file of a model's name, verified, or the one that a path means."""
    name = os.fspath(name_or_path)
    if name in SHIPPED:
        file, sha256 = SHIPPED[name]
        path = WEIGHTS / file
        if not path.is_file():
            raise FileNotFoundError(
                f"The weights of {name} are missing at {path}: check the repository out again."
            )
        if digest(path) != sha256:
            raise ValueError(
                f"{path} has a wrong SHA-256 and is not the {name} that this repository ships: "
                f"check the file out again, or copy it elsewhere and load it by its path."
            )
        return path
    if name in OPENAI:
        file, sha256 = OPENAI[name]
        folder = Path(os.path.expanduser(download_root)) if download_root else cache_folder()
        return fetch(f"{MODELS_URL}/{sha256}/{file}", folder / file, sha256)

    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a checkpoint file in it.")
    in_folder = len(path.parts) > 1 and path.suffix
    if in_folder or path.suffix.lower() in SUFFIXES:
        raise FileNotFoundError(f"There is no checkpoint at {path}: check the path.")
    known = {model.lower(): model for model in available_models()}
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {known[near[0]]}? " if near else ""
    raise ValueError(
        f"Unknown model {name!r}: {hint}Known are {', '.join(available_models())}, and the path "
        "of a checkpoint."
    )


def read_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU and in the precision that it was saved in.

    Args:
        path: a file written by torch.save, safetensors or TorchScript. The tensors may lie
            under "state_dict", and their names may begin with "module.".

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as any of these; nothing in it is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}: check the path.")
    try:
        state = _state_dict(_read(path))
        check_growth(path, sum(map(_bytes, state.values())))
    except Exception as error:  # damage shows in many ways, deep in zipfile, pickle and torch
        raise ValueError(
            f"{path} is not a checkpoint that can be read safely ({_reason(path, error)}): get it "
            "again, or save the model's state_dict() alone with torch.save."
        ) from None
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path} holds no state dict: save the model's state_dict() with torch.save."
        )
    return state


def _state_dict(content: Any) -> dict[str, Any]:
    """The state dict in what a file held, or nothing."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        return {}
    return {str(key).removeprefix("module."): value for key, value in content.items()}


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
        return load_file(path)
    if is_archive(path):
        return read_archive(path)
    if zipfile.is_zipfile(path):
        return read_saved(path)
    # torch.load would unpack archives of its own accord: a zip file by its beginning, and run it
    # where it takes it for TorchScript (2.5 and older), or a tar file.
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            raise ValueError("its end is missing")
    if tarfile.is_tarfile(path):
        raise ValueError("it is a tar file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of formats that are read no longer than they must
        return torch.load(path, map_location="cpu", weights_only=True)


def _reason(path: Path, error: Exception) -> str:
    """Why a file cannot be read, without torch's advice to read it unsafely."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    if not path.stat().st_size:
        return "it is empty"
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it names {named[1]}, which is no tensor; nothing was run"
    known = isinstance(error, (ValueError, RuntimeError, SafetensorError, zipfile.BadZipFile))
    if known and "weights_only" not in text:
        return text.partition(". ")[0].rstrip(".")[:160]
    return "it is no file that torch.save wrote"


def make_preprocess(input_resolution: int) -> transforms.Compose:
    """CLIP's preprocessing: short side to the resolution, centre crop, CLIP's normalisation."""
    return transforms.Compose(
        [
            to_rgb,
            transforms.Resize(input_resolution, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(input_resolution),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, whatever its mode; transparency is dropped.

    As Pillow's `convert`, which CLIP's own preprocessing calls, but for grey of sixteen bits: it
    becomes eight bits, as Pillow does for colour; `convert` would make nearly all of it white.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.int32).clip(0, 65535)
        if image.mode != "I" or values.max(initial=0) > 255:
            values = (values + 128) // 257
        image = Image.fromarray(values.astype(np.uint8))
    elif image.mode in ("P", "PA", "La", "RGBa"):
        image = image.convert({"La": "LA"}.get(image.mode, "RGBA"))
    return image.convert("RGB")
