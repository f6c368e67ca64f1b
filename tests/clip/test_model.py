"""CLIP's towers against open_clip and PyTorch's own modules, on the same random weights."""

import copy
import math

import pytest
import torch
from clip_helpers import (
    CONFIGS,
    TINY_RESNET,
    TINY_VIT,
    open_clip_model,
    random_images,
    random_state_dict,
    random_tokens,
    relative_error,
)
from torch import nn

from clip import CLIP, build_model
from clip.model import EXTRA_KEYS, Attention

TINY = {"vit": TINY_VIT, "resnet": TINY_RESNET}
SHALLOW = {"transformer_layers": 2, "vocab_size": 2000}
REFERENCE = {
    **TINY,
    "wide vit": CONFIGS["ViT-B/32"] | SHALLOW | {"vision_layers": 2},
    "wide resnet": CONFIGS["RN50"] | SHALLOW | {"vision_layers": (1, 1, 1, 1)},
}


def tiny(name="vit", **changes):
    return build_model(random_state_dict({**TINY[name], **changes}))


@pytest.mark.parametrize("name", REFERENCE)
@torch.no_grad()
def test_features_equal_open_clip(name):
    pytest.importorskip("open_clip", reason="open_clip is the reference")
    state = random_state_dict(REFERENCE[name])
    ours, theirs = build_model(state), open_clip_model(state)
    images, tokens = random_images(ours), random_tokens(ours)
    assert relative_error(ours.encode_image(images), theirs.encode_image(images)) < 1e-5
    assert relative_error(ours.encode_text(tokens), theirs.encode_text(tokens)) < 1e-5

    logits, transposed = ours(images, tokens)
    expected, _ = theirs.get_logits(images, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)  # of logits up to 100
    assert torch.equal(transposed, logits.T)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_torch(causal):
    theirs = nn.MultiheadAttention(96, 3, batch_first=True)
    ours = Attention(96, 3, causal)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 7, 96)
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    expected, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_build_model_copies_state_dict(name):
    state, rng_state = random_state_dict(TINY[name]), torch.get_rng_state()
    before = copy.deepcopy(state)
    model = build_model(state)
    assert torch.equal(torch.get_rng_state(), rng_state)
    assert model.visual.input_resolution == TINY[name]["image_resolution"]
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    copied = model.state_dict()
    assert copied.keys() == state.keys() - set(EXTRA_KEYS)
    assert all(torch.equal(copied[key], state[key]) for key in copied)
    for value in copied.values():
        value.zero_()
    assert all(torch.equal(state[key], before[key]) for key in before)


def test_initialization_is_the_published():
    model = CLIP(**TINY_VIT)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    for stack, width, layers in (
        (model.visual.transformer, 128, 4),
        (model.transformer, 64, 2),
    ):
        block = stack.resblocks[0]
        assert block.attn.in_proj_weight.std().item() == pytest.approx(width**-0.5, rel=0.05)
        assert block.mlp.c_fc.weight.std().item() == pytest.approx((2 * width) ** -0.5, rel=0.05)
        residual = (2 * layers * width) ** -0.5
        assert block.attn.out_proj.weight.std().item() == pytest.approx(residual, rel=0.05)
        assert block.mlp.c_proj.weight.std().item() == pytest.approx(residual, rel=0.05)
    features = model.encode_image(random_images(model))
    assert 0.3 < features.std() < 3


def without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


def having(key, value):
    return lambda state: {**state, key: value}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("logit_scale"), "lacks logit_scale"),
        (without("transformer.resblocks.1.attn.in_proj_bias"), "lacks .*in_proj_bias"),
        (having("head.weight", torch.zeros(2)), "unexpected head.weight"),
        (having("logit_scale", torch.zeros(3)), r"logit_scale \(3,\) instead of \(\)"),
        (having("visual.conv1.weight", torch.zeros(5)), "wrongly shaped visual.conv1.weight"),
        (having("visual.positional_embedding", torch.zeros(16, 128)), r"instead of \(10, 128\)"),
        (having("logit_scale", 4.6), "no tensor in logit_scale"),
        (lambda _: {"fc.weight": torch.zeros(2, 2)}, "lacks positional_embedding, .* and 1 more"),
    ],
)
def test_wrong_state_dict_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        build_model(change(random_state_dict(TINY_VIT)))


def test_extra_buffers_are_optional():
    state = random_state_dict(TINY_RESNET)
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    state["transformer.resblocks.0.attn_mask"] = torch.zeros(16, 16)
    assert build_model(state).visual.bn1.num_batches_tracked.item() == 0
