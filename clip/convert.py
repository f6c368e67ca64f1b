"""Convert state dicts of other libraries to OpenAI's layout, and build a CLIP from one.

Known are OpenAI's names, open_clip's (the same, or the text tower's below `text.`) and those of
transformers' `CLIPModel`, all below any prefix and within any dicts that a training script leaves.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from clip.model import CLIP, EXTRA_KEYS
from clip.resnet import TOTAL_STRIDE
from utils import one_line

MARKER_KEYS = (  # what stands before one is a prefix; the last two are those of a tower alone
    "visual.conv1.weight", "logit_scale",
    "vision_model.embeddings.patch_embedding.weight", "token_embedding.weight",
)  # fmt: skip
USUAL_NAMES = ("state_dict", "model", "model_state_dict")  # of the dict that has the model
# DataParallel, torch.compile, FSDP and activation checkpointing leave these within names.
WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_\w+_wrapped_module|module)\.")

BY_OPEN_CLIP = "open_clip runs it where open_clip_config.json is next to it"
NOT_OPENAIS = (  # pattern of a key, what has it, the way out
    (r"\.base_layer\.|\.lora_[AB]\.", "a model with unmerged PEFT adapters, or these adapters only",
     "load it with peft on its base, merge_and_unload() and save_pretrained()"),
    (r"\bw_lora_[AB]$", "CLIP-LoRA's lora_weights.pt, adapters only",
     "merge them with CLIP-LoRA's code, and save the model's state_dict()"),
    (r"\b(prompt_learner|image_encoder)\.|\b(ctx|token_prefix)$",
     "CoOp's, which lacks the token embedding",
     "CoOp leaves CLIP's weights as they are: name the backbone that it was trained on"),
    (r"\.c_fc\.(r|theta)$", "a GmP model, with radius and angle in place of weights",
     "convert it back to weights with its own script"),
    (r"\bvisual\.(blocks\.|cls_token|pos_embed)", "an EVA-CLIP",
     "name it as open_clip:EVA02-B-16/FILE, or open_clip's own tag"),
    (r"\bpositional_embedding_res$", "a Long-CLIP with two tables of positions",
     "take the transformers version, which has one, or join rows 0-19 of positional_embedding "
     "with the other rows of positional_embedding_res"),
    (r"logit_bias$|\bvision_model\.head\.", "a SigLIP", BY_OPEN_CLIP),
    (r"\btext_decoder\.", "a CoCa", BY_OPEN_CLIP),
    (r"\bvisual\.trunk\.", "a model with a timm trunk as image tower", BY_OPEN_CLIP),
    (r"\btext\.transformer\.(embeddings|encoder|layer|shared)\b|\btext\.proj\.|\bbert\.",
     "a model with a Hugging Face text tower", BY_OPEN_CLIP),
)  # fmt: skip

HF_TO_OPENAI = (  # parts of names in transformers' and in OpenAI's layout
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("text_model.final_layer_norm.", "ln_final."),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),  # transformers' spelling
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    (".self_attn.", ".attn."),
    (".layer_norm", ".ln_"),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
HF_PROJECTIONS = {  # transposed there
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
}
TEXT_PREFIXES = ("token_embedding.", "transformer.", "text_model.")


def extract_state_dict(content: Any) -> tuple[dict[str, Tensor], str]:
    """Find the state dict of a CLIP in what a training script saved: dicts within dicts.

    Returns it, or else all tensors by the path of their keys, and a note on what was removed from
    the names, if anything.
    """
    state = dict(_flatten(content))
    if not state:
        raise ValueError("it holds no state dict")
    prefix = _find_prefix(state)
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    removed = {prefix, *(wrapper for key in state for wrapper in WRAPPERS.findall(key))} - {""}
    state = {WRAPPERS.sub("", key): value for key, value in state.items()}
    return state, f"without {', '.join(map(repr, sorted(removed)))} in names" if removed else ""


def _flatten(content: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in dicts within dicts, each with its keys joined by dots."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, Tensor):
            yield f"{path}{key}", value
        else:
            yield from _flatten(value, f"{path}{key}.")


def _find_prefix(state: Mapping[str, Tensor]) -> str:
    """What stands before the names of a CLIP, which may have wrappers within."""
    for marker in MARKER_KEYS:
        names = re.escape(marker).replace(r"\.", rf"\.(?:{WRAPPERS.pattern})*")
        matches = [re.fullmatch(rf"(|.*\.){names}", key) for key in state]
        if prefixes := [match[1] for match in matches if match]:
            return min(prefixes, key=_rank_prefix)
    return ""


def _rank_prefix(prefix: str) -> tuple[bool, list[bool]]:
    """Averaged weights (EMA) come last; of others the outermost comes first, below usual names."""
    parts = WRAPPERS.sub("", prefix).split(".")[:-1]
    return "ema" in prefix.lower(), [part not in USUAL_NAMES for part in parts]


def convert_to_openai(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a state dict without prefix as OpenAI does.

    Raises:
        ValueError: The model is not built like OpenAI's CLIP; its kind is named.
    """
    for pattern, kind, remedy in NOT_OPENAIS:
        if key := next(filter(re.compile(pattern).search, state), None):
            raise ValueError(f"it is {kind} (it has {key}): {remedy}")
    if any(key.startswith("vision_model.") for key in state):
        state = _convert_from_hf(state)
    state = {key.removeprefix("text."): value for key, value in state.items()}
    has_image_tower = any(key.startswith("visual.") for key in state)
    has_text_tower = any(key.startswith(TEXT_PREFIXES) for key in state)
    if has_image_tower != has_text_tower:
        tower = "image" if has_image_tower else "text"
        raise ValueError(f"it has only the {tower} tower: name the CLIP that it belongs to")
    return state


def _convert_from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors, transpose the projections, and join queries, keys and values."""
    result = {}
    for key, value in state.items():
        for theirs, ours in HF_TO_OPENAI:
            key = key.replace(theirs, ours)
        if key in HF_PROJECTIONS:
            result[HF_PROJECTIONS[key]] = value.t()
        elif not key.endswith(".position_ids"):
            result[key] = value
    for key in [key for key in result if ".attn.q_proj." in key]:
        qkv = [key.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if result.keys() >= {*qkv}:
            joined = torch.cat([result.pop(part) for part in qkv])
            result[key.replace(".q_proj.", ".in_proj_")] = joined
    return result


def convert_to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict from OpenAI's layout to that of transformers' CLIPModel."""
    projections = {ours: theirs for theirs, ours in HF_PROJECTIONS.items()}
    result = {}
    for key, value in state.items():
        for theirs, ours in HF_TO_OPENAI:
            if key.startswith(ours):
                key = theirs + key.removeprefix(ours)
            elif ours.startswith("."):
                key = key.replace(ours, theirs)
        if ".in_proj_" in key:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                result[key.replace(".in_proj_", f".{part}_proj.")] = rows
        elif key in projections:
            result[projections[key]] = value.T
        else:
            result[key] = value
    return result


def build_model(
    state_dict: Mapping[str, Tensor],
    activation: str = "quickgelu",
    heads: tuple[int, int] | None = None,
) -> CLIP:
    """Build the CLIP that a state dict describes, and load its weights.

    The model is in float32 and evaluation mode, on the device of the tensors, which it copies.

    Args:
        state_dict: Tensors of any floating type in any layout that `convert_to_openai` knows.
        activation: Activation of the MLPs, "quickgelu" or "gelu".
        heads: Attention heads of the image tower (of a ResNet's pool) and of the text tower; None
            is OpenAI's rule, one for every 64 channels.

    Raises:
        ValueError: The tensors are not those of a CLIP like OpenAI's, or the heads do not fit.
    """
    state = {
        key: value.detach().clone(memory_format=torch.contiguous_format)
        for key, value in convert_to_openai(state_dict).items()
        if key.rpartition(".")[2] not in (*EXTRA_KEYS, "attn_mask")
    }
    try:
        with torch.device("meta"):  # takes neither memory nor random numbers
            model = CLIP(**infer_model_args(state), heads=heads, activation=activation)
        model.load_state_dict(state, assign=True)
    except Exception as error:  # sizes that no CLIP has show in many ways
        reason = f"{error} is missing" if isinstance(error, KeyError) else one_line(str(error))
        raise ValueError(f"no CLIP can be built of its tensors: {reason.rstrip('.')}") from None
    return model.float().eval()


def infer_model_args(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer the sizes among the arguments of `CLIP` from the shapes in OpenAI's layout."""
    is_vit = "visual.proj" in state
    positions_key = f"visual.{'' if is_vit else 'attnpool.'}positional_embedding"
    mlp_key = "transformer.resblocks.0.mlp.c_fc.bias"
    width, _, _, patch_size = state["visual.conv1.weight"].shape
    side = math.isqrt(len(state[positions_key]) - 1)  # of the grid of patches, without the class
    if is_vit:
        vision_layers = _count_blocks(state, "visual.transformer.resblocks.")
    else:
        vision_layers = tuple(_count_blocks(state, f"visual.layer{i}.") for i in (1, 2, 3, 4))
    transformer_width, embed_dim = state["text_projection"].shape
    return {
        "embed_dim": embed_dim,
        "image_resolution": side * (patch_size if is_vit else TOTAL_STRIDE),
        "vision_layers": vision_layers,
        "vision_width": width if is_vit else 2 * width,
        "vision_patch_size": patch_size if is_vit else None,
        "vision_mlp": len(state[f"visual.{mlp_key}"]) if is_vit else None,
        "context_length": len(state["positional_embedding"]),
        "vocab_size": len(state["token_embedding.weight"]),
        "transformer_width": transformer_width,
        "transformer_layers": _count_blocks(state, "transformer.resblocks."),
        "transformer_mlp": len(state[mlp_key]),
    }


def _count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].partition(".")[0] for key in state if key.startswith(prefix)})
