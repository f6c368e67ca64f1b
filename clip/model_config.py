"""How a checkpoint was trained: what its tensors do not say.

The activation, the numbers of heads and the normalisation of images stand in the configuration
beside a file (transformers' `config.json` and `preprocessor_config.json`, open_clip's
`open_clip_config.json`) or in the installed open_clip package. They also say whether a model is
built as OpenAI's CLIP is.
"""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip.preprocess import OPENAI_MEAN, OPENAI_STD
from clip.simple_tokenizer import VOCAB_SIZE

OPEN_CLIP = "open_clip:"  # what precedes NAME/PRETRAINED of the installed open_clip package

# What configurations leave out where it is as usual.
CLIP_VISION = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
               "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}  # fmt: skip
CLIP_TEXT = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8,
             "vocab_size": VOCAB_SIZE, "eos_token_id": 49407, "hidden_act": "quick_gelu",
             "layer_norm_eps": 1e-5}  # fmt: skip
OPEN_VISION = {"width": 768, "layers": 12, "head_width": 64, "patch_size": 16, "pool_type": "tok",
               "pos_embed_type": "learnable"}  # fmt: skip
OPEN_TEXT = {"width": 512, "layers": 12, "heads": 8, "pool_type": "argmax", "proj_type": "linear"}
ACTIVATIONS = {"quick_gelu": "quickgelu", "gelu": "gelu"}  # transformers' names, and ours

# Settings of open_clip that make a tower another than OpenAI's where they are set ...
UNSUPPORTED_OPTIONS = {
    "timm_model_name": "a timm trunk as image tower",
    "hf_model_name": "a Hugging Face text tower",
    "attentional_pool": "attentional pooling",
    "no_ln_pre": "no layer norm before its blocks",
    "final_ln_after_pool": "a layer norm after pooling",
    "ls_init_value": "layer scale",
    "embed_cls": "a class token in its texts",
    "no_causal_mask": "a text tower that is not causal",
    "proj_bias": "a text projection with a bias",
    "act_kwargs": "a GELU of its own",
    "norm_kwargs": "layer norms of its own",
}
# ... and where they are not as in OPEN_VISION and OPEN_TEXT.
REQUIRED_DEFAULTS = {"pool_type", "pos_embed_type", "proj_type"}


@dataclass(frozen=True)
class ModelConfig:
    """What a configuration says, or, without arguments, that there is none.

    Attributes:
        source: the configuration, as an error or a note names it.
        activation: "quickgelu" or "gelu".
        heads: attention heads of the image tower and of the text tower.
        sizes: arguments of `CLIP` that the weights must agree with.
        normalisation: mean and standard deviation of images, RGB.
        geometry: how images were brought to the model's size, where it is not as CLIP does.
    """

    source: str = ""
    activation: str | None = None
    heads: tuple[int, int] | None = None
    sizes: Mapping[str, Any] = field(default_factory=dict)
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] = (OPENAI_MEAN, OPENAI_STD)
    geometry: str = ""

    def check(self, sizes: Mapping[str, Any]) -> None:
        """Refuse weights of other sizes: the configuration is then another model's."""
        for key, said in self.sizes.items():
            if said != sizes[key]:
                raise ValueError(
                    f"{self.source} describes another model ({key} {said}, and the weights have "
                    f"{sizes[key]}): keep each checkpoint in a folder of its own"
                )


def find_config_next_to(path: Path) -> ModelConfig:
    """What the configuration in a checkpoint's folder says, if there is one.

    Raises:
        ValueError: if it cannot be read, or is of a model that is built otherwise.
    """
    for name, parse in (
        ("open_clip_config.json", from_open_clip_config),
        ("config.json", from_hf_config),
    ):
        config = _json(path.with_name(name))
        if config is None or not (config.keys() & {"model_cfg", "vision_config", "model_type"}):
            continue  # not there, or another program's
        try:
            return parse(config, path.with_name(name))
        except (ArithmeticError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path.with_name(name)} cannot be understood ({type(error).__name__}: {error}): "
                "get it again, or move it away and name activation and heads"
            ) from None
    return ModelConfig()


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is none."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}): get it again") from None
    return content if isinstance(content, dict) else None


def from_hf_config(config: Mapping[str, Any], path: Path) -> ModelConfig:
    """What the `config.json` of a transformers model says, and the processor's beside it.

    Raises:
        ValueError: if it is not a CLIPModel, or one that is built otherwise.
    """
    if (kind := config.get("model_type", "clip")) != "clip":
        raise ValueError(f"{path} describes a {kind!r} of transformers, and not a CLIPModel")
    towers = []
    for name, usual in (("vision_config", CLIP_VISION), ("text_config", CLIP_TEXT)):
        said = {**(config.get(name) or {}), **(config.get(f"{name}_dict") or {})}
        towers.append({**usual, **said})
    vision, text = towers
    activations = {tower["hidden_act"] for tower in towers}
    if len(activations) > 1 or not activations <= ACTIVATIONS.keys():
        raise ValueError(
            f"{path} describes a model with the activation {' and '.join(sorted(activations))}: "
            f"only {' or '.join(ACTIVATIONS)} in both towers can be used"
        )
    for tower in towers:
        if tower["layer_norm_eps"] != 1e-5:
            raise ValueError(
                f"{path} describes layer norms with an epsilon of {tower['layer_norm_eps']}, and "
                "not of 1e-5"
            )
    end = text["eos_token_id"]  # 2 where transformers, too, takes the highest id
    if isinstance(end, int) and end != 2 and end < min(text["vocab_size"], VOCAB_SIZE) - 1:
        raise ValueError(f"{path} describes texts that end in token {end}, not in the highest")
    processor = _json(path.with_name("preprocessor_config.json"))
    if processor is None:
        processor = (_json(path.with_name("processor_config.json")) or {}).get("image_processor")
    processor = processor or {}
    return ModelConfig(
        source=str(path),
        activation=ACTIVATIONS[activations.pop()],
        heads=(int(vision["num_attention_heads"]), int(text["num_attention_heads"])),
        sizes={
            "vision_width": vision["hidden_size"],
            "vision_layers": vision["num_hidden_layers"],
            "vision_patch_size": vision["patch_size"],
            "transformer_width": text["hidden_size"],
            "transformer_layers": text["num_hidden_layers"],
        },
        normalisation=_normalisation(processor.get("image_mean"), processor.get("image_std")),
    )


def from_open_clip_config(config: Mapping[str, Any], path: Path | str) -> ModelConfig:
    """What an `open_clip_config.json` says, or the same content from the open_clip package.

    Raises:
        ValueError: if it is of a model that is built otherwise.
    """
    model = config["model_cfg"]
    vision, text = {**OPEN_VISION, **model["vision_cfg"]}, {**OPEN_TEXT, **model["text_cfg"]}
    otherwise = [
        what for key, what in UNSUPPORTED_OPTIONS.items() if vision.get(key) or text.get(key)
    ]
    otherwise += [
        f"the {key} {tower[key]!r}"
        for tower, usual in ((vision, OPEN_VISION), (text, OPEN_TEXT))
        for key in REQUIRED_DEFAULTS & usual.keys()
        if tower[key] != usual[key]
    ]
    if text.get("hf_tokenizer_name") and text.get("vocab_size", VOCAB_SIZE) != VOCAB_SIZE:
        otherwise.append("a tokenizer of its own")
    if model.get("init_logit_bias") is not None:
        otherwise.insert(0, "a SigLIP's logit bias")
    if model.get("multimodal_cfg"):
        otherwise.insert(0, "a CoCa's text decoder")
    if otherwise:
        raise ValueError(
            f"{path} describes a model with {', '.join(otherwise[:3])}, which is not built as "
            "OpenAI's CLIP is"
        )
    layers, width = vision["layers"], vision["width"]
    resnet = isinstance(layers, list | tuple)
    images = config.get("preprocess_cfg") or {}
    odd = [images.get("resize_mode", "shortest"), images.get("interpolation", "bicubic")]
    return ModelConfig(
        source=str(path),
        activation="quickgelu" if model.get("quick_gelu") else "gelu",
        heads=(int((32 if resnet else 1) * width // vision["head_width"]), int(text["heads"])),
        sizes={
            "embed_dim": model["embed_dim"],
            "vision_width": width,
            "vision_layers": tuple(layers) if resnet else layers,
            "vision_patch_size": None if resnet else vision["patch_size"],
            "transformer_width": text["width"],
            "transformer_layers": text["layers"],
        },
        normalisation=_normalisation(images.get("mean"), images.get("std")),
        geometry="" if odd == ["shortest", "bicubic"] else " and ".join(odd),
    )


def _normalisation(mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation as three floats each, OpenAI's where nothing is said."""
    if mean is None or std is None:
        return OPENAI_MEAN, OPENAI_STD
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
        raise TypeError(f"images normalised by {mean} and {std}")
    return mean, std


def from_open_clip_pretrained(name: str) -> tuple[ModelConfig, dict[str, Any] | Path]:
    """What the installed open_clip package says of `open_clip:NAME/PRETRAINED`.

    Returns:
        The recipe, and either open_clip's record of where the weights come from or, where
        PRETRAINED is a file's path, that.

    Raises:
        ValueError: if the package is not installed, does not know the name, or knows it as a model
            that is built otherwise.
    """
    model, slash, pretrained = name.removeprefix(OPEN_CLIP).partition("/")
    if not model or not slash or not pretrained:
        raise ValueError(f"{name!r} should be open_clip:NAME/PRETRAINED")
    if importlib.util.find_spec("open_clip") is None:
        raise ValueError(f"{name} needs the open_clip package: pip install open_clip_torch")
    import open_clip

    config = open_clip.get_model_config(model)
    if config is None:
        raise ValueError(f"open_clip has no model {model!r}: open_clip.list_models() has the names")
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    file = Path(pretrained).expanduser()
    if not tag and not file.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise ValueError(f"open_clip has no weights {pretrained!r} for {model}: it has {tags}")
    # A model's name may be used with weights that need the other GELU; the weights know.
    gelu = tag.get("quick_gelu", False) or config.get("quick_gelu", False)
    content = {"model_cfg": {**config, "quick_gelu": gelu}, "preprocess_cfg": tag}
    return from_open_clip_config(content, f"open_clip's {model}"), tag or file
