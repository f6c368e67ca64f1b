"""Read how a checkpoint was trained, which its tensors do not contain.

The activation, the numbers of heads and the normalization of images are in the configuration next
to a file (transformers' `config.json` and `preprocessor_config.json`, open_clip's
`open_clip_config.json`) or in the installed open_clip package.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from clip.preprocess import OPENAI_MEAN, OPENAI_RESIZE, OPENAI_STD
from clip.resnet import TOTAL_STRIDE
from utils import did_you_mean

OPEN_CLIP = "open_clip:"  # precedes NAME/PRETRAINED of the installed open_clip package

# The defaults of transformers' CLIPConfig, and of open_clip's CLIPVisionCfg and CLIPTextCfg.
HF_VISION = {"num_attention_heads": 12, "hidden_act": "quick_gelu"}
HF_TEXT = {"num_attention_heads": 8, "hidden_act": "quick_gelu"}
HF_ACTIVATIONS = {"quick_gelu": "quickgelu", "gelu": "gelu"}  # transformers' names and ours
OPEN_CLIP_VISION = {"width": 768, "layers": 12, "head_width": 64, "patch_size": 16}
OPEN_CLIP_TEXT = {"width": 512, "layers": 12, "heads": 8}
OPEN_CLIP_PREPROCESS = dict(
    mean=OPENAI_MEAN, std=OPENAI_STD, resize_mode="shortest", interpolation="bicubic"
)
# All other options of open_clip, where they are set, make a tower that is unlike OpenAI's, except
# these, which may have any value or one of these values.
OPENAI_OPTIONS = {
    *OPEN_CLIP_VISION, *OPEN_CLIP_TEXT,
    "image_size", "mlp_ratio", "context_length", "vocab_size", "patch_dropout",
}  # fmt: skip
OPENAI_VALUES = ("tok", "argmax", "learnable", "linear", "default")


@dataclass(frozen=True)
class ModelConfig:
    """What a configuration says; without arguments, that there is none.

    Attributes:
        source: Name of the configuration in errors and notes.
        activation, heads: As in `clip.load`.
        image_mean, image_std, resize: As in `clip.preprocess.image_transform`.
        open_clip_cfg: open_clip's model configuration, where its towers are unlike OpenAI's.
    """

    source: str = ""
    activation: str | None = None
    heads: tuple[int, int] | None = None
    image_mean: tuple[float, ...] = OPENAI_MEAN
    image_std: tuple[float, ...] = OPENAI_STD
    resize: tuple[str, str] = OPENAI_RESIZE
    open_clip_cfg: Mapping[str, Any] = field(default_factory=dict)


def find_config_next_to(path: Path) -> ModelConfig:
    """Read the configuration in a checkpoint's folder, if there is one."""
    for name, parse in (
        ("open_clip_config.json", from_open_clip_config),
        ("config.json", from_hf_config),
    ):
        file = path.with_name(name)
        try:
            config = _read_json(file)
            if config.keys() & {"model_cfg", "vision_config", "model_type"}:  # no other program's
                return parse(config, file)
        except Exception as error:  # of many kinds, where values have unexpected types
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            raise ValueError(
                f"{file} cannot be used ({reason}): get it again, or move it away and name "
                "activation and heads"
            ) from None
    return ModelConfig()


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def from_hf_config(config: Mapping[str, Any], path: Path) -> ModelConfig:
    """Parse the `config.json` of transformers' CLIPModel, and the processor's next to it."""
    if (model_type := config.get("model_type", "clip")) != "clip":
        raise ValueError(f"it describes a {model_type!r} of transformers, not a CLIPModel")
    vision, text = (
        {**defaults, **(config.get(name) or {}), **(config.get(f"{name}_dict") or {})}
        for name, defaults in (("vision_config", HF_VISION), ("text_config", HF_TEXT))
    )
    activations = {vision["hidden_act"], text["hidden_act"]}
    if len(activations) > 1 or not activations <= HF_ACTIVATIONS.keys():
        raise ValueError(f"no CLIP of OpenAI's kind has the activations {sorted(activations)}")
    processor = _read_json(path.with_name("preprocessor_config.json"))
    processor = processor or _read_json(path.with_name("processor_config.json"))
    processor = processor.get("image_processor") or processor
    return ModelConfig(
        source=str(path),
        activation=HF_ACTIVATIONS[activations.pop()],
        heads=(int(vision["num_attention_heads"]), int(text["num_attention_heads"])),
        image_mean=tuple(map(float, processor.get("image_mean") or OPENAI_MEAN)),
        image_std=tuple(map(float, processor.get("image_std") or OPENAI_STD)),
    )


def from_open_clip_config(config: Mapping[str, Any], source: Path | str) -> ModelConfig:
    """Parse an `open_clip_config.json`, or the same content from the open_clip package."""
    model = config["model_cfg"]
    vision = {**OPEN_CLIP_VISION, **model["vision_cfg"]}
    text = {**OPEN_CLIP_TEXT, **model["text_cfg"]}
    options = [*vision.items(), *text.items()]
    is_openai = not (model.get("multimodal_cfg") or model.get("init_logit_bias")) and not any(
        value and key not in OPENAI_OPTIONS and value not in OPENAI_VALUES for key, value in options
    )
    preprocess = config.get("preprocess_cfg") or {}
    preprocess = OPEN_CLIP_PREPROCESS | {k: v for k, v in preprocess.items() if v is not None}
    pool_stride = TOTAL_STRIDE if isinstance(vision["layers"], list | tuple) else 1
    return ModelConfig(
        source=str(source),
        activation="quickgelu" if model.get("quick_gelu") else "gelu",
        heads=(int(pool_stride * vision["width"] // vision["head_width"]), int(text["heads"])),
        image_mean=tuple(map(float, preprocess["mean"])),
        image_std=tuple(map(float, preprocess["std"])),
        resize=(preprocess["resize_mode"], preprocess["interpolation"]),
        open_clip_cfg={} if is_openai else model,
    )


def from_open_clip_pretrained(name: str) -> tuple[ModelConfig, dict[str, Any] | Path]:
    """Look up `open_clip:NAME/PRETRAINED`: its configuration, and its weights' record or path."""
    model, _, pretrained = name.removeprefix(OPEN_CLIP).partition("/")
    if not model or not pretrained:
        raise ValueError(f"{name!r} should be open_clip:NAME/PRETRAINED")
    open_clip = import_open_clip(name)
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


def import_open_clip(user: str) -> ModuleType:
    """Import the open_clip package, which `user` needs."""
    try:
        import open_clip
    except ImportError:
        raise ValueError(f"{user} needs open_clip: pip install open_clip_torch") from None
    return open_clip
