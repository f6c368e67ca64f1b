"""State dicts of other makers into OpenAI's layout, and a CLIP from one.

Read are OpenAI's own names, open_clip's (the same, or the text tower's below `text.`) and those of
transformers' `CLIPModel`; all of them below any prefix and within any dicts that a training script
leaves. What is built otherwise than OpenAI's CLIP is refused by its name.
"""

import math
import re
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip.model import CLIP, EXTRA_KEYS
from clip.resnet import TOTAL_STRIDE

MAX_BLOCKS = 1000  # in a stack: a file's names alone would have this many made

# One of these is in every layout, and what stands before it in a file is a prefix.
MARKER_KEYS = (
    "visual.conv1.weight",
    "vision_model.embeddings.patch_embedding.weight",
    "logit_scale",
)
STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict", "module")  # preferred to other dicts
DEPTH = 4  # dicts within dicts that are looked through
# Wrappers of single modules, which leave their names in the middle of others.
WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\."
)

UNSUPPORTED_MODELS = (  # what a key betrays
    (r"logit_bias$|^vision_model\.head\.", "a SigLIP"),
    (r"^text_decoder\.", "a CoCa"),
    (r"^visual\.trunk\.", "a model with a timm trunk as image tower"),
    (r"^text\.transformer\.(embeddings|encoder|layer|shared)\b|^text\.proj\.|^bert\.",
     "a model with a Hugging Face text tower"),
    (r"^visual\.attn_pool\.", "a model with attentional pooling"),
    (r"\.ls_[12]\.", "a model with layer scale"),
    (r"^text\.cls_emb$", "a model with a class token in its texts"),
    (r"^(text\.)?text_projection\.bias$", "a model whose text projection has a bias"),
)  # fmt: skip

HF_TO_OPENAI = (  # parts of names, in transformers and in OpenAI's layout
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


class ExtractedState(NamedTuple):
    """A state dict within a file's content."""

    state: dict[str, Any]  # without prefix
    where: str  # how it was found, in words; empty where it is the content itself


def extract_state_dict(content: Any) -> ExtractedState | None:
    """The state dict of a CLIP in what a training script saved.

    Args:
        content: dicts within dicts, of which one has a CLIP's tensors, under any prefix. It may
            contain itself.

    Returns:
        The first below one of NESTS, or the first there is; None where no dict holds a tensor.
    """
    found, plain = [], None
    waiting, seen = deque([((), content)]), set()
    while waiting:
        path, inner = waiting.popleft()
        if not isinstance(inner, dict) or id(inner) in seen or len(path) > DEPTH:
            continue
        seen.add(id(inner))
        state = {str(key): value for key, value in inner.items()}
        if prefixes := _prefixes(state):
            found.append((path, prefixes[0], state))
            continue
        if plain is None and any(isinstance(value, Tensor) for value in state.values()):
            plain = (path, "", state)
        waiting += [((*path, key), value) for key, value in state.items()]
    if not found and not plain:
        return None
    found.sort(key=lambda one: not one[0] or one[0][-1] not in STATE_DICT_KEYS)
    (path, prefix, state), *others = found or [plain]

    words = []
    if path:
        words.append(f"below {'.'.join(path)!r}")
    chosen = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    if prefix:
        words.append(f"without the prefix {prefix!r}")
    inside = {match[0] for key in chosen for match in WRAPPERS.finditer(key)}
    if inside:
        words.append("without " + ", ".join(map(repr, sorted(inside))) + " inside names")
        chosen = {WRAPPERS.sub("", key): value for key, value in chosen.items()}
    if left := [key for key in state if not key.startswith(prefix)]:
        words.append(f"leaving out {_first_few(left)}")
    if others:
        words.append("not " + ", ".join(repr(".".join(path)) for path, _, _ in others))
    return ExtractedState(chosen, ", ".join(words))


def _prefixes(state: Mapping[str, Any]) -> list[str]:
    """What stands before a CLIP's names, shortest first; none where these are of no CLIP."""
    for keys in (state, {WRAPPERS.sub("", key) for key in state}):
        for anchor in MARKER_KEYS:
            ends = [key for key in keys if key == anchor or key.endswith(f".{anchor}")]
            if ends:
                return sorted((key.removesuffix(anchor) for key in ends), key=len)
    return []


def convert_to_openai(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict by OpenAI's names, from any of the layouts that are read.

    Args:
        state: without prefix.

    Returns:
        The same tensors, but for transformers' queries, keys and values, which are joined, and its
        projections, which are transposed.

    Raises:
        ValueError: if it is of a model that is built otherwise, which is named.
    """
    state = {str(key): value for key, value in state.items()}
    for pattern, name in UNSUPPORTED_MODELS:
        if key := next(filter(re.compile(pattern).search, state), None):
            raise ValueError(f"it is {name} (it has {key}), and not built as OpenAI's CLIP is")
    blocks = any(key.startswith("visual.transformer.resblocks.") for key in state)
    if blocks and "visual.class_embedding" not in state:
        raise ValueError("its image tower has no class token, as OpenAI's CLIP has")
    if any(key.startswith("vision_model.") for key in state):
        state = _from_transformers(state)
    return {key.removeprefix("text."): value for key, value in state.items()}


def _from_transformers(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of transformers' CLIPModel by OpenAI's names."""
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
        parts = [key.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if all(isinstance(result.get(part), Tensor) for part in parts):
            joined = torch.cat([result.pop(part) for part in parts])
            result[key.replace(".q_proj.", ".in_proj_")] = joined
    return {key: value for key, value in result.items() if not key.endswith(".position_ids")}


def build_model(
    state_dict: Mapping[str, Tensor],
    activation: str = "quickgelu",
    heads: tuple[int, int] | None = None,
) -> CLIP:
    """Make the CLIP that a state dict describes, whatever its sizes, and fill it.

    Args:
        state_dict: tensors in any layout that `convert_to_openai` knows, of any floating type; left
            unchanged.
        activation: that of the MLPs, "quickgelu" or "gelu"; no state dict tells it.
        heads: attention heads of the image tower (of a ResNet's pool) and of the text tower;
            OpenAI's, one for every 64 channels, when None. No state dict tells them either.

    Returns:
        The model in float32 and in evaluation mode, on the device of the tensors.

    Raises:
        ValueError: if tensors are missing, unexpected or wrongly shaped, of which some are named;
            if the model is built otherwise; or if the heads do not fit.
    """
    state = {k: v for k, v in convert_to_openai(state_dict).items() if not _is_extra(k)}
    vision_heads, transformer_heads = heads or (None, None)
    with torch.device("meta"):  # shapes alone: neither memory nor random numbers
        model = CLIP(
            **infer_model_args(state), vision_heads=vision_heads, transformer_heads=transformer_heads,  # noqa: E501
            activation=activation,
        ).float()  # fmt: skip
    expected = model.state_dict()
    for key in expected.keys() - state.keys():
        if key.endswith("num_batches_tracked"):  # older files lack it, and nothing here reads it
            state[key] = torch.tensor(0, device="cpu")
    if state.get("logit_scale", expected["logit_scale"]).numel() == 1:
        state = {k: v.reshape(()) if k == "logit_scale" else v for k, v in state.items()}

    _refuse("lacks", expected.keys() - state.keys())
    _refuse("holds unexpected", state.keys() - expected.keys())
    wrong = {
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if state[key].shape != value.shape
    }
    _refuse("holds wrongly shaped", wrong)

    state = {
        key: value.detach().to(expected[key].dtype, copy=True).contiguous()
        for key, value in state.items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval()


def _is_extra(key: str) -> bool:
    return key.rpartition(".")[2] in (*EXTRA_KEYS, "attn_mask")


def _first_few(names: list[str]) -> str:
    """The first three names, in letters alone, and how many more there are."""
    names = ["".join(filter(str.isprintable, name)) for name in names]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _refuse(complaint: str, keys: set[str]) -> None:
    """Raise a ValueError that names the first few keys, unless there are none."""
    if keys:
        raise ValueError(
            f"the state dict is not a CLIP's: it {complaint} {_first_few(sorted(keys))}"
        )


def infer_model_args(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes among the arguments of `CLIP`, read from the shapes in OpenAI's layout.

    Raises:
        ValueError: if tensors that tell them are missing or wrongly shaped, or anything is not a
            tensor.
    """
    odd = {k for k, v in state.items() if not isinstance(v, Tensor) and not _is_extra(k)}
    _refuse("holds no tensor in", odd)
    vit = "visual.proj" in state
    place = "visual" if vit else "visual.attnpool"
    matrices = ("token_embedding.weight", "positional_embedding", "text_projection")
    dimensions = dict.fromkeys((*matrices, f"{place}.positional_embedding"), 2)
    dimensions["visual.conv1.weight"] = 4
    _refuse("lacks", dimensions.keys() - state.keys())
    wrong = {k for k, n in dimensions.items() if state[k].dim() != n or not state[k].numel()}
    _refuse("holds wrongly shaped", wrong)

    width, _, _, patch = state["visual.conv1.weight"].shape
    positions = len(state[f"{place}.positional_embedding"])
    side = math.isqrt(max(positions - 1, 0))
    if side < 1 or side**2 + 1 != positions:
        _refuse("holds wrongly shaped", {f"{place}.positional_embedding"})
    if vit:
        layers = _count(state, "visual.transformer.resblocks.")
    else:
        layers = tuple(_count(state, f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
    return {
        "embed_dim": state["text_projection"].shape[1],
        "image_resolution": side * (patch if vit else TOTAL_STRIDE),
        "vision_layers": layers,
        "vision_width": width if vit else 2 * width,
        "vision_patch_size": patch if vit else None,
        "vision_mlp": _mlp(state, "visual.transformer.") if vit else None,
        "context_length": len(state["positional_embedding"]),
        "vocab_size": len(state["token_embedding.weight"]),
        "transformer_width": state["text_projection"].shape[0],
        "transformer_layers": _count(state, "transformer.resblocks."),
        "transformer_mlp": _mlp(state, "transformer."),
    }


def _mlp(state: Mapping[str, Tensor], tower: str) -> int | None:
    """Channels inside a tower's MLPs, where they can be read."""
    bias = state.get(f"{tower}resblocks.0.mlp.c_fc.bias")
    return None if bias is None else bias.numel() or None


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many different blocks have parameters below a prefix."""
    count = len({key[len(prefix) :].partition(".")[0] for key in state if key.startswith(prefix)})
    if count > MAX_BLOCKS:
        _refuse(f"holds {count} blocks of", {prefix.rstrip(".")})
    return count
