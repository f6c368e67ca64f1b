"""Brings a CLIP, by name or from a file, and the preprocessing that belongs to it.

model, preprocess = load("ViT-B/16")
features = model.encode_image(preprocess(Image.open("cat.jpg")).unsqueeze(0))
"""

import difflib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torchvision import transforms

from clip.convert import build_model, infer_model_args
from clip.download import cache_dir, download_url, sha256_file
from clip.files import SUFFIXES, find_weight_file, read_checkpoint
from clip.model import ACTIVATIONS, CLIP
from clip.model_config import OPEN_CLIP, ModelConfig, find_config_next_to, from_open_clip_pretrained
from clip.preprocess import image_transform
from utils import detect_placeholder_file

MODELS_URL = "https://openaipublic.azureedge.net/clip/models"  # /<sha256>/<file>
_MODELS = {  # name: (file, SHA-256)
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

WEIGHTS_DIR = Path(__file__).parent / "weights"  # what this repository ships
BUNDLED_MODELS = {  # name: (file, SHA-256)
    "ViT-Tiny/8": (
        "ViT-Tiny-8.pt",
        "d3150fd4582eaba16b95b1c4cc93710ecd18a18dd240ef72a2da3206f0cf3d50",
    ),
}


def available_models() -> list[str]:
    """The names that `load` knows: OpenAI's nine, then what this repository ships."""
    return [*_MODELS, *BUNDLED_MODELS]


def load(
    name_or_path: str | os.PathLike,
    device: str | torch.device | None = None,
    download_root: str | os.PathLike | None = None,
    *,
    activation: str | None = None,
    heads: tuple[int, int] | None = None,
) -> tuple[CLIP, transforms.Compose]:
    """Load a CLIP and the preprocessing of its images.

    A state dict does not tell which GELU it was trained with, nor with how many heads. The
    configuration beside the file decides, then the arguments, then OpenAI's rule: QuickGELU and a
    head for every 64 channels. Standard error says what was assumed of a file that is not OpenAI's.

    Args:
        name_or_path: one of `available_models()`; `open_clip:NAME/PRETRAINED` of the installed
            open_clip package; or the path of a checkpoint, or of a folder with one, in the layout
            of OpenAI, open_clip or transformers, saved by torch.save, as safetensors or as
            TorchScript. Nothing in the file is executed.
        device: where the model goes; CUDA where there is one, otherwise the CPU.
        download_root: the folder that downloads lie in; ~/.cache/clip when None. A file that is
            there is verified, and downloaded again if it is not the one that belongs there.
        activation: "quickgelu" or "gelu", where no configuration says it.
        heads: attention heads of the image tower (of a ResNet's pool) and of the text tower, where
            no configuration says it.

    Returns:
        The model in float32 and evaluation mode, nothing frozen; and a transform that turns a
        PIL image of any size and mode into its input (3, R, R).

    Raises:
        ValueError: if the name or the device is unknown, or the file is not a CLIP's checkpoint.
        FileNotFoundError: if there is no such file.
        ConnectionError: if a download fails.
    """
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(f"the activation must be {' or '.join(ACTIVATIONS)}, not {activation!r}")
    heads = None if heads is None else tuple(heads)
    device = _device(device)
    name, path = os.fspath(name_or_path), resolve_checkpoint(name_or_path, download_root)
    state = read_checkpoint(path)
    try:
        recipe = _recipe(name, path)
        recipe.check(infer_model_args(state))
        activation_used = recipe.activation or activation or "quickgelu"
        model = build_model(state, activation_used, recipe.heads or heads)
    except (ValueError, RuntimeError) as error:  # torch's own, of sizes that it cannot have
        raise ValueError(f"{path} cannot be used: {error}") from None
    model.image_mean, model.image_std = recipe.normalisation
    for note in _notes(path, model, recipe, activation, heads):
        print(f"note: {note}", file=sys.stderr)
    resolution = model.visual.input_resolution
    return model.to(device), image_transform(resolution, model.image_mean, model.image_std)


def _recipe(name: str, path: Path) -> ModelConfig:
    """What is said about a checkpoint other than by its tensors."""
    if name in available_models():
        return ModelConfig(source=name)
    return (
        from_open_clip_pretrained(name)[0]
        if name.startswith(OPEN_CLIP)
        else find_config_next_to(path)
    )


def _notes(
    path: Path,
    model: CLIP,
    recipe: ModelConfig,
    activation: str | None,
    heads: tuple[int, int] | None,
) -> Iterator[str]:
    """What a user should know: that a wish was overruled, or how a choice was made."""
    for asked, used in ((activation, model.activation), (heads, model.heads)):
        if asked not in (None, used):
            yield f"{recipe.source} says {used}, which decides, and not {asked}"
    if recipe.geometry:
        yield (
            f"{recipe.source} resizes images otherwise ({recipe.geometry}) than is done here "
            "(short side, bicubic, centre crop)"
        )
    if not recipe.source and not (activation and heads) and not _is_known(path):
        assumed = [] if activation else ["QuickGELU"]
        assumed += [] if heads else ["{} and {} attention heads".format(*model.heads)]
        yield (
            f"nothing beside {path} says how it was trained: {' and '.join(assumed)} (image and "
            "text tower) are assumed by OpenAI's rule; --activation and --heads (activation=, "
            "heads=) name others"
        )


def _is_known(path: Path) -> bool:
    """Whether a file is one of OpenAI's or one that this repository ships, whatever its name."""
    known = {sha256 for _, sha256 in (*_MODELS.values(), *BUNDLED_MODELS.values())}
    return sha256_file(path) in known


def _device(device: str | torch.device | None) -> torch.device:
    """The device asked for, tried before anything large is read."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise ValueError(
            f"the device {str(device)!r} cannot be used ({reason}): name another, such as cpu"
        ) from None


def validate_name(name_or_path: str | os.PathLike) -> None:
    """Refuse what `load` would not find, without downloading or reading anything large.

    Args:
        name_or_path: as `load` takes it.

    Raises:
        ValueError: if it is neither a known name nor a checkpoint.
        FileNotFoundError: if it is a path that leads nowhere, or a folder without a checkpoint.
    """
    name = os.fspath(name_or_path)
    if name in available_models():
        return
    if name.startswith(OPEN_CLIP):
        from_open_clip_pretrained(name)
        return
    path = _find(name)
    if what := detect_placeholder_file(path):
        raise ValueError(f"{path} is {what}")


def resolve_checkpoint(
    name_or_path: str | os.PathLike, download_root: str | os.PathLike | None = None
) -> Path:
    """The file of a model's name, downloaded and verified, or the one that a path means.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: as `load`.
    """
    name = os.fspath(name_or_path)
    if name in BUNDLED_MODELS:
        file, sha256 = BUNDLED_MODELS[name]
        path = WEIGHTS_DIR / file
        if not path.is_file():
            raise FileNotFoundError(
                f"the weights of {name} are missing at {path}: check the repository out again"
            )
        if what := detect_placeholder_file(path):
            raise ValueError(f"{path} is {what}")
        if sha256_file(path) != sha256:
            raise ValueError(
                f"{path} has a wrong SHA-256 and is not the {name} that this repository ships: "
                "check the file out again, or copy it elsewhere and load it by its path"
            )
        return path
    folder = Path(os.path.expanduser(download_root)) if download_root else None
    if name in _MODELS:
        file, sha256 = _MODELS[name]
        target = (folder or cache_dir()) / file
        return download_url(f"{MODELS_URL}/{sha256}/{file}", target, sha256)
    if name.startswith(OPEN_CLIP):
        return _from_open_clip(name, folder)
    return _find(name)


def _from_open_clip(name: str, folder: Path | None) -> Path:
    """The file of `open_clip:NAME/PRETRAINED`, which open_clip finds in its caches or downloads."""
    _, source = from_open_clip_pretrained(name)
    if isinstance(source, Path):
        return source
    from open_clip.pretrained import download_pretrained

    errors = []
    # The hub, then the address; the weights may lie in the cache of either.
    for hub in (True, False) if source.get("hf_hub") and source.get("url") else (True,):
        try:
            return Path(download_pretrained(source, hub, folder and str(folder)))
        except Exception as error:  # of many kinds, from several packages
            errors.append(" ".join(str(error).split()).partition(". ")[0][:200])
    model = name.removeprefix(OPEN_CLIP).partition("/")[0]
    raise ConnectionError(
        f"open_clip cannot bring the weights of {name} ({errors[0]}): get the file on a machine "
        f"that can, and name {OPEN_CLIP}{model}/FILE with its path"
    )


def _find(name: str) -> Path:
    """The checkpoint that a path means, be it the file or its folder."""
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path
    if path.is_dir():
        return find_weight_file(path)
    in_folder = len(path.parts) > 1 and path.suffix
    if in_folder or path.is_absolute() or path.suffix.lower() in SUFFIXES:
        raise FileNotFoundError(f"there is no checkpoint at {path}: check the path")
    known = {model.lower(): model for model in available_models()}
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {known[near[0]]}? " if near else ""
    if len(path.parts) == 2 and not near:
        hint = f"`hf download {name} --local-dir FOLDER` brings what the Hugging Face hub has; "
    raise ValueError(
        f"unknown model {name!r}: {hint}known are {', '.join(available_models())}, "
        "open_clip:NAME/PRETRAINED, and the path of a checkpoint or its folder"
    )
