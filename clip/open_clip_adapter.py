"""CLIPs whose towers are not of OpenAI's kind, run by open_clip's own modules.

SigLIP and other timm trunks, EVA, CoCa, text towers of transformers, ViTs with other options: what
the installed open_clip package knows how to build is built by it, and it brings the tokenizer.

`load_open_clip` returns open_clip's model itself, so that its parameters have the names of its
checkpoints. `encode_image`, `encode_text`, `logit_scale` and `visual` are open_clip's; set on it is
what this repository reads of a CLIP besides:

    tokenize(texts, truncate=False), context_length, visual.input_resolution,
    image_mean, image_std, image_resize, settings, save_config(folder)
"""

import copy
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip.model_config import OPEN_CLIP, ModelConfig
from utils import detect_placeholder_file, one_line

# What a transformers configuration decides, and weights do not contain.
HF_SETTINGS = ("hidden_act", "num_attention_heads", "layer_norm_eps", "position_embedding_type")


def load_open_clip(name: str, path: Path, config: ModelConfig) -> nn.Module:
    """Build open_clip's model of a configuration and load its weights.

    Args:
        name: As in `clip.load`: `open_clip:NAME/PRETRAINED`, or any path.
        path: The weights. Of a path, the folder holds the tokenizer's files, too, and may hold the
            `config.json` of a text tower of transformers.
        config: Of `open_clip_config.json` or the open_clip package.

    Returns:
        The model in float32 and evaluation mode, on the CPU.

    Raises:
        ValueError: open_clip is missing, cannot build the model or its tokenizer (for which it may
            need timm or transformers), or the weights are not its.
    """
    if placeholder := detect_placeholder_file(path):
        raise ValueError(f"{path} is {placeholder}")
    if importlib.util.find_spec("open_clip") is None:
        raise ValueError(f"{config.source} needs the package: pip install open_clip_torch")
    import open_clip

    cfg = copy.deepcopy(dict(config.open_clip_cfg))
    is_named = name.startswith(OPEN_CLIP)
    folder = None if is_named else path.parent
    source = name.removeprefix(OPEN_CLIP).partition("/")[0] if is_named else f"local-dir:{folder}"
    problem = f"open_clip cannot build {config.source} or its tokenizer"
    with _one_sentence(problem, _build_hint(cfg["text_cfg"], folder)):
        model = _build_model(cfg, folder).float()
        tokenizer = open_clip.get_tokenizer(source)
        if torch.equal(*tokenizer(["a", "b"])):  # transformers makes one of no files
            raise ValueError("its vocabulary is empty")
    hint = "keep each checkpoint with its own configuration in a folder"
    with _one_sentence(f"{path} does not hold the weights of {config.source}", hint):
        open_clip.load_checkpoint(model, str(path))
    _set_interface(model, tokenizer, config)
    return model.eval()


@contextmanager
def _one_sentence(problem: str, remedy: str) -> Iterator[None]:
    """Turn errors of open_clip, timm, transformers and the hub, of any kind, into a ValueError."""
    try:
        yield
    except Exception as error:
        reason = one_line(str(error) or type(error).__name__).partition(". ")[0][:200]
        raise ValueError(f"{problem} ({reason}): {remedy}") from error


def _build_hint(text_cfg: Mapping[str, Any], folder: Path | None) -> str:
    """What to do where a model or its tokenizer cannot be built."""
    repo = text_cfg.get("hf_model_name") or text_cfg.get("hf_tokenizer_name")
    if not repo:
        return "check the configuration, or install a newer open_clip_torch and timm"
    return (
        f"`hf download {repo} config.json --include '*token*' 'vocab*' --local-dir "
        f"{folder or 'FOLDER'}` brings its files where the hub can be reached"
    )


def _build_model(cfg: dict[str, Any], folder: Path | None) -> nn.Module:
    """open_clip's model with random weights; nothing is downloaded but a text tower's config."""
    import open_clip

    vision_cfg, text_cfg = cfg["vision_cfg"], cfg["text_cfg"]
    is_hf = "hf_model_name" in text_cfg
    if "timm_model_name" in vision_cfg:
        vision_cfg["timm_model_pretrained"] = False
    if is_hf:
        text_cfg["hf_model_pretrained"] = False
        for config_dir in (folder / text_cfg["hf_model_name"], folder) if folder else ():
            if (config_dir / "config.json").is_file():
                text_cfg["hf_model_name"] = str(config_dir)
                break
    if not (cfg.pop("custom_text", False) or is_hf):
        return open_clip.CLIP(**cfg)
    return (open_clip.CoCa if "multimodal_cfg" in cfg else open_clip.CustomTextCLIP)(**cfg)


def _set_interface(model: nn.Module, tokenizer: Callable[..., Tensor], config: ModelConfig) -> None:
    """Set on an open_clip model what this repository reads of a CLIP."""
    size = model.visual.image_size
    model.visual.input_resolution = size if isinstance(size, int) else size[0]
    model.image_mean, model.image_std = config.normalization
    model.image_resize = config.resize
    model.tokenize = partial(tokenize, tokenizer)
    model.context_length = tokenizer.context_length
    model.save_config = partial(save_config, model, tokenizer, config)
    model.settings = [_describe(model, config), *config.normalization, config.resize]


def _describe(model: nn.Module, config: ModelConfig) -> str:
    """How a model is built, as JSON without names of files and of repositories on the hub."""
    cfg = copy.deepcopy(dict(config.open_clip_cfg))
    for key in ("hf_model_name", "hf_tokenizer_name"):
        cfg["text_cfg"].pop(key, None)
    hf_config = getattr(getattr(model, "text", None), "config", None)
    cfg["hf"] = {key: getattr(hf_config, key, None) for key in HF_SETTINGS}
    return json.dumps(cfg, sort_keys=True)


def save_config(
    model: nn.Module, tokenizer: Callable[..., Tensor], config: ModelConfig, folder: Path
) -> None:
    """Write the files that open_clip needs next to the weights, into an existing folder."""
    (mean, std), (mode, interpolation) = config.normalization, config.resize
    preprocess = dict(mean=mean, std=std, resize_mode=mode, interpolation=interpolation)
    content = {"model_cfg": config.open_clip_cfg, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    hf_config = getattr(getattr(model, "text", None), "config", None)
    for part in (tokenizer, hf_config):
        if hasattr(part, "save_pretrained"):  # of transformers
            part.save_pretrained(folder)


def tokenize(
    tokenizer: Callable[..., Tensor], texts: str | Sequence[str], truncate: bool = False
) -> Tensor:
    """Tokenize texts with open_clip's tokenizer, which truncates unasked: (N, context_length).

    Raises:
        ValueError: A text has too many tokens, and `truncate` is False.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not truncate:
        # With room for one more token, a text that fits ends as an empty one does: in padding.
        length = tokenizer.context_length + 1
        last_tokens = tokenizer([*texts, ""], length)[:, -1]
        if torch.any(too_long := last_tokens[:-1] != last_tokens[-1]):
            text = texts[int(too_long.nonzero()[0])]
            raise ValueError(
                f"{text[:60]!r} has more than {tokenizer.context_length} tokens: shorten it, or "
                "use truncate=True"
            )
    return tokenizer(texts, tokenizer.context_length)
