"""Random CLIPs, and open_clip as their reference."""

import torch
from torch import Tensor, nn

from clip import CLIP
from clip.model import EXTRA_KEYS

KEYS = (
    "embed_dim", "image_resolution", "vision_layers", "vision_width", "vision_patch_size",
    "context_length", "vocab_size", "transformer_width", "transformer_layers",
)  # fmt: skip
SIZES = {
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 12),
    "ViT-B/32": (512, 224, 12, 768, 32, 77, 49408, 512, 12),
    "ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 12),
}
CONFIGS = {name: dict(zip(KEYS, sizes, strict=True)) for name, sizes in SIZES.items()}
TINY_VIT = dict(zip(KEYS, (64, 32, 4, 128, 8, 16, 514, 64, 2), strict=True))
TINY_RESNET = dict(zip(KEYS, (64, 64, (1, 2, 1, 1), 8, None, 16, 514, 64, 2), strict=True))


def random_state_dict(config: dict, seed: int = 0) -> dict[str, Tensor]:
    """Random float32 weights of a CLIP in OpenAI's format, none of them at its neutral value."""
    with torch.device("meta"):
        shapes = CLIP(**config).state_dict()
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in shapes.items():
        name = key.rpartition(".")[2]
        noise = torch.randn(value.shape, generator=generator)
        if key == "logit_scale":
            state[key] = torch.tensor(100.0).log()
        elif name == "num_batches_tracked":
            state[key] = torch.tensor(seed)
        elif name == "running_var":
            state[key] = 0.5 + noise.abs()
        elif value.dim() == 1 and name == "weight":  # of a normalization
            state[key] = 1 + 0.1 * noise
        else:
            state[key] = noise * (value[0].numel() ** -0.5 if value.dim() > 1 else 0.1)
    sizes = (config[key] for key in ("image_resolution", "context_length", "vocab_size"))
    return state | {key: torch.tensor(size) for key, size in zip(EXTRA_KEYS, sizes, strict=True)}


def open_clip_model(state: dict[str, Tensor]) -> nn.Module:
    """The same weights in open_clip's model, in float32."""
    from open_clip.model import build_model_from_openai_state_dict

    state = {key: value for key, value in state.items() if key not in EXTRA_KEYS}
    model = build_model_from_openai_state_dict(dict(state)).float()
    model.load_state_dict(state)  # once more, since it rounds what it builds from to fp16
    return model.eval()


def random_tokens(model, count=4):
    """Texts of different lengths: start, random tokens, end, zeros."""
    generator = torch.Generator().manual_seed(2)
    start, end = model.vocab_size - 2, model.vocab_size - 1
    tokens = torch.randint(start, (count, model.context_length), generator=generator)
    tokens[:, 0] = start
    for row, length in zip(tokens, range(3, 3 + 2 * count, 2), strict=True):
        row[length - 1] = end
        row[length:] = 0
    return tokens


@torch.no_grad()
def assert_features_equal(model, encode_image, encode_text):
    """Compare a model with another's functions on random inputs; return images and tokens."""
    side = model.visual.input_resolution
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    tokens = random_tokens(model)
    assert relative_error(model.encode_image(images), encode_image(images)) < 1e-5
    assert relative_error(model.encode_text(tokens), encode_text(tokens)) < 1e-5
    return images, tokens


def relative_error(ours, theirs):
    """The largest error of a row, as a share of the row's length."""
    return ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max().item()
