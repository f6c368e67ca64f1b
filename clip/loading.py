"""Load a CLIP by its name or from a file, with the preprocessing of its images."""

import os
import sys
from pathlib import Path

import torch
from torch import nn
from torchvision import transforms

from clip.convert import build_model
from clip.download import cache_dir, download_url, sha256_file
from clip.files import SUFFIXES, check_file, find_weight_file, first_sentence, read_checkpoint
from clip.model import ACTIVATIONS, CLIP
from clip.model_config import OPEN_CLIP, ModelConfig, find_config_next_to, from_open_clip_pretrained
from clip.open_clip_adapter import load_open_clip
from clip.preprocess import image_transform
from utils import did_you_mean

MODELS_URL = "https://openaipublic.azureedge.net/clip/models"  # /<sha256>/<file>
_MODELS = {  # name: SHA-256 of the file
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
WEIGHTS_DIR = Path(__file__).parent / "weights"
BUNDLED_MODELS = {"ViT-Tiny/8": "d3150fd4582eaba16b95b1c4cc93710ecd18a18dd240ef72a2da3206f0cf3d50"}


def available_models() -> list[str]:
    """Names that `load` knows: OpenAI's nine, then those of the weights in this repository."""
    return [*_MODELS, *BUNDLED_MODELS]


def load(
    name_or_path: str | os.PathLike,
    device: str | torch.device | None = None,
    download_root: str | os.PathLike | None = None,
    *,
    activation: str | None = None,
    heads: tuple[int, int] | None = None,
) -> tuple[CLIP | nn.Module, transforms.Compose]:
    """Load a CLIP and the preprocessing of its images.

    A state dict does not contain the kind of GELU and the number of heads. The configuration next
    to the file decides, then `activation` and `heads` (see `build_model`), then OpenAI's rule. What
    was assumed is printed on standard error, unless the file is OpenAI's.

    Args:
        name_or_path: One of `available_models()`; `open_clip:NAME/PRETRAINED` of the installed
            open_clip package; or the path of a checkpoint, or of a folder with one, in the layout
            of OpenAI, open_clip or transformers. Nothing in the file is executed.
        device: Device of the model; None is CUDA where there is one, else the CPU.
        download_root: Folder of downloads; None is ~/.cache/clip.

    Returns:
        The model in float32 and evaluation mode: a `CLIP`, or open_clip's own where its towers are
        of another kind (`clip.open_clip_adapter`); and a transform that turns a PIL image of any
        size and mode into its input (3, R, R).

    Raises:
        ValueError: The name is unknown, or the file is not a CLIP's checkpoint.
        FileNotFoundError: There is no such file.
        ConnectionError: A download failed.
    """
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(f"the activation must be {' or '.join(ACTIVATIONS)}, not {activation!r}")
    heads = tuple(heads) if heads else None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    path, config = resolve_checkpoint(name_or_path, download_root)
    if config.open_clip_cfg:
        model = load_open_clip(os.fspath(name_or_path), path, config)
    else:
        model = _load_clip(path, config, activation, heads)
    used = (model.activation, model.heads) if isinstance(model, CLIP) else ()
    for argument in (activation, heads):
        if argument and argument not in used:
            print(f"note: {config.source} says otherwise; ignoring {argument}", file=sys.stderr)
    side = model.visual.input_resolution
    transform = image_transform(side, model.image_mean, model.image_std, model.image_resize)
    return model.to(device), transform


def resolve_checkpoint(
    name_or_path: str | os.PathLike, download_root: str | os.PathLike | None = None
) -> tuple[Path, ModelConfig]:
    """The checkpoint file of a model, which may be downloaded, and its configuration."""
    name = os.fspath(name_or_path)
    filename = name.replace("/", "-").replace("@", "-") + ".pt"
    folder = Path(os.path.expanduser(download_root)) if download_root else cache_dir()
    if name in _MODELS:
        url = f"{MODELS_URL}/{_MODELS[name]}/{filename}"
        return download_url(url, folder / filename, _MODELS[name]), ModelConfig(source=name)
    if name in BUNDLED_MODELS:
        return WEIGHTS_DIR / filename, ModelConfig(source=name)
    if not name.startswith(OPEN_CLIP):
        path = _resolve_path(name)
        return path, find_config_next_to(path)
    config, source = from_open_clip_pretrained(name)
    if isinstance(source, Path):
        return source, config
    from open_clip.pretrained import download_pretrained

    try:
        return Path(download_pretrained(source, cache_dir=download_root and str(folder))), config
    except Exception as error:  # of many kinds, from several packages
        raise ConnectionError(
            f"open_clip cannot download the weights of {name} ({first_sentence(error)}): get the "
            f"file on a machine that can, and name {name.partition('/')[0]}/FILE with its path"
        ) from None


def _resolve_path(name: str) -> Path:
    """The checkpoint at a path, or in the folder there."""
    path = Path(os.path.expanduser(name.removeprefix("local-dir:")))
    if path.is_dir():
        path = find_weight_file(path)
    is_path = path.is_absolute() or name.startswith(".") or path.suffix.lower() in SUFFIXES
    is_path = is_path or len(path.parts) > 1 and path.suffix
    if path.is_file() or is_path:
        check_file(path)
        return path
    hint, hub_name = did_you_mean(name, available_models()), name.removeprefix("hf-hub:")
    if name != hub_name or not hint and len(path.parts) == 2:
        hint = f" (`hf download {hub_name} --local-dir FOLDER` downloads it; then name FOLDER)"
    raise ValueError(
        f"unknown model {name!r}{hint}: known are {', '.join(available_models())}, "
        "open_clip:NAME/PRETRAINED, and the path of a checkpoint or its folder"
    )


def _load_clip(
    path: Path, config: ModelConfig, activation: str | None, heads: tuple[int, int] | None
) -> CLIP:
    """Build a CLIP of OpenAI's kind, and print what was assumed about it."""
    state_dict = read_checkpoint(path)
    activation_used = config.activation or activation or "quickgelu"
    try:
        model = build_model(state_dict, activation_used, config.heads or heads)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from None
    model.image_mean, model.image_std = config.image_mean, config.image_std
    model.image_resize = config.resize
    is_unknown = not config.source and not (activation and heads)
    if is_unknown and sha256_file(path) not in {*_MODELS.values(), *BUNDLED_MODELS.values()}:
        print(
            f"note: nothing next to {path} says how it was trained: assuming {model.activation} "
            "and {} and {} attention heads (image and text tower); --activation and --heads "
            "(activation=, heads=) name others".format(*model.heads),
            file=sys.stderr,
        )
    return model


def validate_name(name_or_path: str | os.PathLike) -> None:
    """Raise the errors of `load` for a name or path, without downloading or reading weights."""
    name = os.fspath(name_or_path)
    if name.startswith(OPEN_CLIP):
        from_open_clip_pretrained(name)
    elif name not in available_models():
        _resolve_path(name)
