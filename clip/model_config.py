"""Read how a checkpoint was trained, which its tensors do not contain.

The activation, the numbers of heads and the normalization of images are in the configuration next
to a file (transformers' `config.json` and `preprocessor_config.json`, open_clip's
`open_clip_config.json`) or in the installed open_clip package. These also say whether a model is
built like OpenAI's CLIP. Of other models, those of open_clip are run by open_clip's own modules
(clip/open_clip_adapter.py); those of transformers are refused with a ValueError.
"""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip.preprocess import OPENAI_MEAN, OPENAI_RESIZE, OPENAI_STD
from utils import did_you_mean, truncate_list

OPEN_CLIP = "open_clip:"  # precedes NAME/PRETRAINED of the installed open_clip package

# The defaults of transformers' CLIPConfig, and of open_clip's CLIPVisionCfg and CLIPTextCfg.
HF_VISION = {"num_attention_heads": 12, "hidden_act": "quick_gelu"}
HF_TEXT = {"num_attention_heads": 8, "hidden_act": "quick_gelu"}
HF_ACTIVATIONS = {"quick_gelu": "quickgelu", "gelu": "gelu"}  # transformers' names and ours
OPEN_CLIP_VISION = {"width": 768, "layers": 12, "head_width": 64, "patch_size": 16}
OPEN_CLIP_TEXT = {"width": 512, "layers": 12, "heads": 8}
# All other options of open_clip, where they are set, make a tower that is unlike OpenAI's, except
# these, which may have any value or one of these values.
SIZE_OPTIONS = {"image_size", "mlp_ratio", "context_length", "vocab_size", "patch_dropout"}
OPENAI_VALUES = ("tok", "argmax", "learnable", "linear", "default")


@dataclass(frozen=True)
class ModelConfig:
    """What a configuration says; without arguments, that there is none.

    Attributes:
        source: Name of the configuration in errors and notes.
        activation: "quickgelu" or "gelu".
        heads: Attention heads of the image tower and of the text tower.
        normalization: Mean and standard deviation of images, RGB.
        resize: How images are resized and interpolated; see `clip.preprocess.image_transform`.
        open_clip_cfg: open_clip's model configuration, where its towers are built otherwise.
    """

    source: str = ""
    activation: str | None = None
    heads: tuple[int, int] | None = None
    normalization: tuple[tuple[float, ...], tuple[float, ...]] = (OPENAI_MEAN, OPENAI_STD)
    resize: tuple[str, str] = OPENAI_RESIZE
    open_clip_cfg: Mapping[str, Any] = field(default_factory=dict)


def find_config_next_to(path: Path) -> ModelConfig:
    """Read the configuration in a checkpoint's folder, if there is one."""
    for name, parse in (
        ("open_clip_config.json", from_open_clip_config),
        ("config.json", from_hf_config),
    ):
        config = _read_json(path.with_name(name))
        if not config.keys() & {"model_cfg", "vision_config", "model_type"}:
            continue  # not there, or another program's
        try:
            return parse(config, path.with_name(name))
        except (ArithmeticError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path.with_name(name)} cannot be understood ({type(error).__name__}: {error}): "
                "get it again, or move it away and name activation and heads"
            ) from None
    return ModelConfig()


def _read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; an empty one where there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}): get it again") from None
    return content if isinstance(content, dict) else {}


def from_hf_config(config: Mapping[str, Any], path: Path) -> ModelConfig:
    """Parse the `config.json` of transformers' CLIPModel, and the processor's next to it."""
    if (model_type := config.get("model_type", "clip")) != "clip":
        raise ValueError(f"{path} describes a {model_type!r} of transformers, not a CLIPModel")
    vision, text = (
        {**defaults, **(config.get(name) or {}), **(config.get(f"{name}_dict") or {})}
        for name, defaults in (("vision_config", HF_VISION), ("text_config", HF_TEXT))
    )
    activations = {vision["hidden_act"], text["hidden_act"]}
    if len(activations) > 1 or not activations <= HF_ACTIVATIONS.keys():
        raise ValueError(
            f"{path} describes a model with the activations {truncate_list(sorted(activations))}, "
            "which is not built like OpenAI's CLIP"
        )
    processor = _read_json(path.with_name("preprocessor_config.json"))
    processor = processor or _read_json(path.with_name("processor_config.json"))
    processor = processor.get("image_processor", processor)
    return ModelConfig(
        source=str(path),
        activation=HF_ACTIVATIONS[activations.pop()],
        heads=(int(vision["num_attention_heads"]), int(text["num_attention_heads"])),
        normalization=_parse_normalization(processor.get("image_mean"), processor.get("image_std")),
    )


def from_open_clip_config(config: Mapping[str, Any], source: Path | str) -> ModelConfig:
    """Parse an `open_clip_config.json`, or the same content from the open_clip package."""
    model = config["model_cfg"]
    vision = {**OPEN_CLIP_VISION, **model["vision_cfg"]}
    text = {**OPEN_CLIP_TEXT, **model["text_cfg"]}
    differences = [key for key in ("multimodal_cfg", "init_logit_bias") if model.get(key)]
    differences += [
        f"{key} {value!r}"
        for tower, sizes in ((vision, OPEN_CLIP_VISION), (text, OPEN_CLIP_TEXT))
        for key, value in tower.items()
        if value and key not in {*sizes, *SIZE_OPTIONS} and value not in OPENAI_VALUES
    ]
    preprocess = config.get("preprocess_cfg") or {}
    common = dict(
        source=str(source),
        normalization=_parse_normalization(preprocess.get("mean"), preprocess.get("std")),
        resize=(
            preprocess.get("resize_mode") or OPENAI_RESIZE[0],
            preprocess.get("interpolation") or OPENAI_RESIZE[1],
        ),
    )
    if differences:
        return ModelConfig(**common, open_clip_cfg=model)
    is_resnet = isinstance(vision["layers"], list | tuple)
    pool_width = (32 if is_resnet else 1) * vision["width"]
    return ModelConfig(
        **common,
        activation="quickgelu" if model.get("quick_gelu") else "gelu",
        heads=(int(pool_width // vision["head_width"]), int(text["heads"])),
    )


def _parse_normalization(mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation as floats; OpenAI's where one is missing."""
    if mean is None or std is None:
        return OPENAI_MEAN, OPENAI_STD
    return tuple(map(float, mean)), tuple(map(float, std))


def from_open_clip_pretrained(name: str) -> tuple[ModelConfig, dict[str, Any] | Path]:
    """Look up `open_clip:NAME/PRETRAINED` in the installed open_clip package.

    Returns:
        The configuration; and open_clip's record of where the weights come from, or the path where
        PRETRAINED is a file.
    """
    model, _, pretrained = name.removeprefix(OPEN_CLIP).partition("/")
    if not model or not pretrained:
        raise ValueError(f"{name!r} should be open_clip:NAME/PRETRAINED")
    if importlib.util.find_spec("open_clip") is None:
        raise ValueError(f"{name} needs the open_clip package: pip install open_clip_torch")
    import open_clip

    config = open_clip.get_model_config(model)
    if config is None:
        hint = did_you_mean(model, open_clip.list_models())
        if model.startswith("hf-hub:"):
            hint = ": download it with `hf download` and name its folder"
        raise ValueError(f"open_clip has no model {model!r}{hint}")
    record = open_clip.get_pretrained_cfg(model, pretrained)
    file = Path(pretrained).expanduser()
    if not record and not file.is_file():
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise ValueError(
            f"open_clip has no weights {pretrained!r} for {model}{did_you_mean(pretrained, tags)}: "
            f"it has {', '.join(tags) or 'none'}"
        )
    # A model's name may be used with weights that need the other GELU; the weights know.
    quick_gelu = record.get("quick_gelu", False) or config.get("quick_gelu", False)
    content = {"model_cfg": {**config, "quick_gelu": quick_gelu}, "preprocess_cfg": record}
    return from_open_clip_config(content, f"open_clip's {model}"), record or file
