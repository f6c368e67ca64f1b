"""CLIPs whose towers are not of OpenAI's kind (SigLIP, EVA, CoCa), run by open_clip's own modules.

The installed open_clip package builds the model and brings the tokenizer. The model keeps its own
`encode_image`, `encode_text`, `logit_scale` and `visual`; set on it is what else is read of a CLIP:

    tokenize(texts, truncate=False), context_length, visual.input_resolution,
    image_mean, image_std, image_resize, settings, save_config(folder)
"""

import copy
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from clip.files import check_file, first_sentence
from clip.model_config import OPEN_CLIP, ModelConfig, import_open_clip

# What a transformers configuration decides, and weights do not contain.
HF_SETTINGS = ("hidden_act", "num_attention_heads", "layer_norm_eps", "position_embedding_type")


def load_open_clip(name: str, path: Path, config: ModelConfig) -> nn.Module:
    """Build open_clip's model in float32 and evaluation mode, on the CPU, and load its weights.

    Unless the name is `open_clip:NAME/PRETRAINED`, the folder of the weights holds the tokenizer's
    files, too, and may hold the `config.json` of a text tower of transformers.
    """
    check_file(path)
    open_clip = import_open_clip(config.source)
    cfg = copy.deepcopy(dict(config.open_clip_cfg))
    repo = cfg["text_cfg"].get("hf_model_name") or cfg["text_cfg"].get("hf_tokenizer_name")
    is_named = name.startswith(OPEN_CLIP)
    folder = None if is_named else path.parent
    source = name.removeprefix(OPEN_CLIP).partition("/")[0] if is_named else f"local-dir:{folder}"
    try:
        model = _build_model(open_clip, cfg, folder).float()
        tokenizer = open_clip.get_tokenizer(source)
        if torch.equal(*tokenizer(["a", "b"])):  # transformers makes one of no files
            raise ValueError("the vocabulary of its tokenizer is empty")
        open_clip.load_checkpoint(model, str(path))
    except Exception as error:  # of open_clip, timm, transformers and the hub
        hint = "keep a checkpoint with its own configuration, or install a newer open_clip_torch"
        if repo:
            hint += (
                f"; `hf download {repo} config.json --include '*token*' 'vocab*' --local-dir "
                f"{folder or 'FOLDER'}` brings the files of its text tower"
            )
        raise ValueError(
            f"open_clip cannot build {config.source} with the weights of {path} "
            f"({first_sentence(error)}): {hint}"
        ) from error
    _set_interface(model, tokenizer, config)
    return model.eval()


def _build_model(open_clip: ModuleType, cfg: dict[str, Any], folder: Path | None) -> nn.Module:
    """open_clip's model with random weights; nothing is downloaded but a text tower's config."""
    vision_cfg, text_cfg = cfg["vision_cfg"], cfg["text_cfg"]
    if "timm_model_name" in vision_cfg:
        vision_cfg["timm_model_pretrained"] = False
    is_hf = "hf_model_name" in text_cfg
    if is_hf:
        text_cfg["hf_model_pretrained"] = False
        if folder and (folder / "config.json").is_file():
            text_cfg["hf_model_name"] = str(folder)
    if not (cfg.pop("custom_text", False) or is_hf):
        return open_clip.CLIP(**cfg)
    return (open_clip.CoCa if "multimodal_cfg" in cfg else open_clip.CustomTextCLIP)(**cfg)


def _set_interface(model: nn.Module, tokenizer: Callable[..., Tensor], config: ModelConfig) -> None:
    """Set on an open_clip model what this repository reads of a CLIP."""
    size = model.visual.image_size
    model.visual.input_resolution = size if isinstance(size, int) else size[0]
    model.image_mean, model.image_std = config.image_mean, config.image_std
    model.image_resize = config.resize
    model.tokenize = partial(tokenize, tokenizer)
    model.context_length = tokenizer.context_length
    hf_config = getattr(getattr(model, "text", None), "config", None)
    model.save_config = partial(save_config, config, [tokenizer, hf_config])
    # How it is built, without names of files and of repositories on the hub.
    cfg = copy.deepcopy(dict(config.open_clip_cfg))
    for key in ("hf_model_name", "hf_tokenizer_name"):
        cfg["text_cfg"].pop(key, None)
    cfg["hf"] = {key: getattr(hf_config, key, None) for key in HF_SETTINGS}
    architecture = json.dumps(cfg, sort_keys=True)
    model.settings = [architecture, config.image_mean, config.image_std, config.resize]


def save_config(config: ModelConfig, parts: Sequence[Any], folder: Path) -> None:
    """Write the files that open_clip needs next to the weights, into an existing folder."""
    mode, interpolation = config.resize
    preprocess = dict(
        mean=config.image_mean, std=config.image_std, resize_mode=mode, interpolation=interpolation
    )
    content = {"model_cfg": config.open_clip_cfg, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    for part in parts:
        if hasattr(part, "save_pretrained"):  # of transformers
            part.save_pretrained(folder)


def tokenize(
    tokenizer: Callable[..., Tensor], texts: str | Sequence[str], truncate: bool = False
) -> Tensor:
    """Tokenize texts with open_clip's tokenizer, which truncates unasked: (N, context_length)."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    length = tokenizer.context_length
    # With room for one more token, a text that fits ends as an empty one does: in padding.
    last_tokens = tokenizer([*texts, ""], length + 1)[:, -1]
    if not truncate and torch.any(last_tokens != last_tokens[-1]):
        raise ValueError(f"a text has more than {length} tokens: shorten it, or use truncate=True")
    return tokenizer(texts, length)
