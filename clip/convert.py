"""Convert state dicts of other libraries to OpenAI's layout, and build a CLIP from one.

Known are OpenAI's names, open_clip's (the same, or the text tower's below `text.`) and those of
transformers' `CLIPModel`, all below any prefix and within any dicts that a training script leaves.
A model that is not built like OpenAI's CLIP is refused, and its kind named.
"""

import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from clip.model import CLIP, EXTRA_KEYS
from clip.resnet import TOTAL_STRIDE
from utils import truncate_list

MARKER_KEYS = (  # every layout has one; what stands before it in a file is a prefix
    "visual.conv1.weight",
    "vision_model.embeddings.patch_embedding.weight",
    "logit_scale",
)
STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict", "module")  # preferred to other dicts
MAX_DEPTH = 4  # of dicts within dicts
FIRST_MLP_BIAS = "transformer.resblocks.0.mlp.c_fc.bias"
# DataParallel, torch.compile, FSDP and activation checkpointing leave these within names.
WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\."
)

BY_OPEN_CLIP = "open_clip runs it where open_clip_config.json is next to it"
NOT_OPENAIS = (  # pattern of a key, what has it, the way out
    (r"\.base_layer\.|\.lora_[AB]\.", "a model with unmerged PEFT adapters, or these adapters only",
     "load it with peft on its base, merge_and_unload() and save_pretrained()"),
    (r"^w_lora_[AB]$", "CLIP-LoRA's lora_weights.pt, adapters only",
     "merge them with CLIP-LoRA's code, and save the model's state_dict()"),
    (r"^prompt_learner\.|^image_encoder\.", "CoOp's, which lacks the token embedding",
     "CoOp leaves CLIP's weights as they are: name the backbone that it was trained on"),
    (r"\.c_fc\.(r|theta)$", "a GmP model, with radius and angle in place of weights",
     "convert it back to weights with its own script"),
    (r"^visual\.(blocks\.|cls_token|pos_embed)", "an EVA-CLIP",
     "name it as open_clip:EVA02-B-16/FILE, or open_clip's own tag"),
    (r"^positional_embedding_res$", "a Long-CLIP with two tables of positions",
     "take the transformers version, which has one, or join rows 0-19 of positional_embedding "
     "with the other rows of positional_embedding_res"),
    (r"logit_bias$|^vision_model\.head\.", "a SigLIP", BY_OPEN_CLIP),
    (r"^text_decoder\.", "a CoCa", BY_OPEN_CLIP),
    (r"^visual\.trunk\.", "a model with a timm trunk as image tower", BY_OPEN_CLIP),
    (r"^text\.transformer\.(embeddings|encoder|layer|shared)\b|^text\.proj\.|^bert\.",
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


def extract_state_dict(content: Any) -> tuple[dict[str, Any], str]:
    """Find the state dict of a CLIP in what a training script saved.

    Args:
        content: Dicts within dicts, of which one has the tensors, under any prefix.

    Returns:
        The state dict of a CLIP without prefix, preferably one below STATE_DICT_KEYS, or else the
        first dict with a tensor; and a note on where it was, "" where it is the content itself.

    Raises:
        ValueError: No dict has a tensor.
    """
    candidates = [
        (path, state)
        for path, state in _iter_dicts(content)
        if any(isinstance(value, Tensor) for value in state.values())
    ]
    if not candidates:
        raise ValueError("it holds no state dict")
    clips = [(path, state) for path, state in candidates if _find_prefix(state) is not None]
    clips.sort(key=lambda clip: not clip[0] or clip[0][-1] not in STATE_DICT_KEYS)
    path, state = (clips or candidates)[0]
    prefix = _find_prefix(state) or ""

    notes = [f"below {'.'.join(path)!r}"] if path else []
    if prefix:
        notes.append(f"without the prefix {prefix!r}")
    if left_out := [key for key in state if not key.startswith(prefix)]:
        notes.append(f"leaving out {truncate_list(left_out)}")
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if wrappers := {match[0] for key in state for match in WRAPPERS.finditer(key)}:
        notes.append(f"without {', '.join(map(repr, sorted(wrappers)))} inside names")
    state = {WRAPPERS.sub("", key): value for key, value in state.items()}
    if clips[1:]:
        notes.append(f"not {truncate_list(repr('.'.join(path)) for path, _ in clips[1:])}")
    return state, ", ".join(notes)


def _iter_dicts(content: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """All dicts in some content with the keys that lead to them, the outer ones first."""
    queue = deque([((), content)])
    while queue:
        path, value = queue.popleft()
        if isinstance(value, dict) and len(path) <= MAX_DEPTH:
            value = {str(key): inner for key, inner in value.items()}
            yield path, value
            queue.extend(((*path, key), inner) for key, inner in value.items())


def _find_prefix(state: Mapping[str, Any]) -> str | None:
    """What stands before the names of a CLIP; None for other names."""
    for keys in (list(state), [WRAPPERS.sub("", key) for key in state]):
        for marker in MARKER_KEYS:
            matches = [key for key in keys if f".{key}".endswith(f".{marker}")]
            if matches:
                return min(matches, key=len).removesuffix(marker)
    return None


def convert_to_openai(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the tensors of any known layout as OpenAI does.

    The same tensors are returned, except that transformers' queries, keys and values are joined
    and its projections transposed.

    Args:
        state_dict: Without prefix.

    Raises:
        ValueError: It belongs to a model that is not built like OpenAI's CLIP; its kind is named.
    """
    state = {str(key): value for key, value in state_dict.items()}
    for pattern, kind, remedy in NOT_OPENAIS:
        if key := next(filter(re.compile(pattern).search, state), None):
            raise ValueError(f"it is {kind} (it has {key}): {remedy}")
    if any(key.startswith("vision_model.") for key in state):
        state = _convert_from_hf(state)
    state = {key.removeprefix("text."): value for key, value in state.items()}
    has_image_tower = any(key.startswith("visual.") for key in state)
    texts = ("token_embedding.", "transformer.", "text_model.")
    if has_image_tower != any(key.startswith(texts) for key in state):
        tower = "image" if has_image_tower else "text"
        raise ValueError(f"it has only the {tower} tower: name the CLIP that it belongs to")
    return state


def _convert_from_hf(state: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the state dict of transformers' CLIPModel."""
    result = {}
    for key, value in state.items():
        for theirs, ours in HF_TO_OPENAI:
            key = key.replace(theirs, ours)
        result[key] = value
    for theirs, ours in (
        ("visual_projection.weight", "visual.proj"),
        ("text_projection.weight", "text_projection"),
    ):
        if isinstance(value := result.pop(theirs, None), Tensor) and value.dim() == 2:
            result[ours] = value.T
    for key in [key for key in result if ".attn.q_proj." in key]:
        qkv = [key.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if all(isinstance(result.get(part), Tensor) for part in qkv):
            joined = torch.cat([result.pop(part) for part in qkv])
            result[key.replace(".q_proj.", ".in_proj_")] = joined
    return {key: value for key, value in result.items() if not key.endswith(".position_ids")}


def convert_to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict from OpenAI's layout to that of transformers' CLIPModel."""
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
        elif key in ("visual.proj", "text_projection"):
            result[{"visual.proj": "visual_projection"}.get(key, key) + ".weight"] = value.T
        else:
            result[key] = value
    return result


def build_model(
    state_dict: Mapping[str, Tensor],
    activation: str = "quickgelu",
    heads: tuple[int, int] | None = None,
) -> CLIP:
    """Build the CLIP that a state dict describes, and load its weights.

    Args:
        state_dict: Tensors of any floating type in any layout that `convert_to_openai` knows.
        activation: Activation of the MLPs, "quickgelu" or "gelu".
        heads: Attention heads of the image tower (of a ResNet's pool) and of the text tower; None
            is OpenAI's rule, one for every 64 channels.

    Returns:
        The model in float32 and evaluation mode, on the device of the tensors, which it copies.

    Raises:
        ValueError: Tensors are missing, unexpected or wrongly shaped, of which some are named; the
            model is not built like OpenAI's CLIP; or the heads do not fit.
    """
    state = {k: v for k, v in convert_to_openai(state_dict).items() if not _is_extra(k)}
    vision_heads, transformer_heads = heads or (None, None)
    with torch.device("meta"):  # takes neither memory nor random numbers
        model = CLIP(
            **infer_model_args(state),
            vision_heads=vision_heads,
            transformer_heads=transformer_heads,
            activation=activation,
        ).float()
    expected = model.state_dict()
    for key in expected.keys() - state.keys():
        if key.endswith("num_batches_tracked"):  # older files lack it, and nothing here reads it
            state[key] = torch.tensor(0, device="cpu")
    _raise_for_keys("lacks", expected.keys() - state.keys())
    _raise_for_keys("holds unexpected", state.keys() - expected.keys())
    if state["logit_scale"].numel() == 1:
        state["logit_scale"] = state["logit_scale"].reshape(())
    mismatched = {
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if state[key].shape != value.shape
    }
    _raise_for_keys("holds wrongly shaped", mismatched)
    state = {
        key: value.detach().to(expected[key].dtype, copy=True).contiguous()
        for key, value in state.items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval()


def infer_model_args(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer the sizes among the arguments of `CLIP` from the shapes in OpenAI's layout.

    Raises:
        ValueError: Tensors with these sizes are missing or wrongly shaped, or a value is no tensor.
    """
    not_tensors = {k for k, v in state.items() if not isinstance(v, Tensor) and not _is_extra(k)}
    _raise_for_keys("holds no tensor in", not_tensors)
    is_vit = "visual.proj" in state
    positions_key = f"visual.{'' if is_vit else 'attnpool.'}positional_embedding"
    dims = {
        "visual.conv1.weight": 4,
        positions_key: 2,
        "token_embedding.weight": 2,
        "positional_embedding": 2,
        "text_projection": 2,
        FIRST_MLP_BIAS: 1,
    }
    if is_vit:
        dims[f"visual.{FIRST_MLP_BIAS}"] = 1
    _raise_for_keys("lacks", dims.keys() - state.keys())
    mismatched = {k for k, n in dims.items() if state[k].dim() != n or not state[k].numel()}
    _raise_for_keys("holds wrongly shaped", mismatched)

    width, _, _, patch_size = state["visual.conv1.weight"].shape
    positions = len(state[positions_key])
    side = math.isqrt(positions - 1)  # of the grid of patches; the class token has one, too
    if is_vit:
        vision_layers = _count_blocks(state, "visual.transformer.resblocks.")
    else:
        vision_layers = tuple(_count_blocks(state, f"visual.layer{i}.") for i in (1, 2, 3, 4))
    return {
        "embed_dim": state["text_projection"].shape[1],
        "image_resolution": side * (patch_size if is_vit else TOTAL_STRIDE),
        "vision_layers": vision_layers,
        "vision_width": width if is_vit else 2 * width,
        "vision_patch_size": patch_size if is_vit else None,
        "vision_mlp": len(state[f"visual.{FIRST_MLP_BIAS}"]) if is_vit else None,
        "context_length": len(state["positional_embedding"]),
        "vocab_size": len(state["token_embedding.weight"]),
        "transformer_width": state["text_projection"].shape[0],
        "transformer_layers": _count_blocks(state, "transformer.resblocks."),
        "transformer_mlp": len(state[FIRST_MLP_BIAS]),
    }


def _count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].partition(".")[0] for key in state if key.startswith(prefix)})


def _is_extra(key: str) -> bool:
    return key.rpartition(".")[2] in (*EXTRA_KEYS, "attn_mask")


def _raise_for_keys(problem: str, keys: Iterable[str]) -> None:
    """Raise a ValueError that names the keys, unless there are none."""
    if keys:
        raise ValueError(
            f"the state dict is not a CLIP's: it {problem} {truncate_list(sorted(keys))}"
        )
