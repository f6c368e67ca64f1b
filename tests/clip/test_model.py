"""CLIP's towers against open_clip's, on the same random weights."""

import copy
import math

import pytest
import torch
from clip_helpers import (
    CONFIGS,
    TINY_RESNET,
    TINY_VIT,
    assert_features_equal,
    open_clip_model,
    random_state_dict,
)

from clip import CLIP, build_model
from clip.model import EXTRA_KEYS

TINY = {"vit": TINY_VIT, "resnet": TINY_RESNET}
SHALLOW = {"transformer_layers": 2, "vocab_size": 2000}
REFERENCE = {
    **TINY,
    "wide vit": CONFIGS["ViT-B/32"] | SHALLOW | {"vision_layers": 2},
    "wide resnet": CONFIGS["RN50"] | SHALLOW | {"vision_layers": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("name", REFERENCE)
@torch.no_grad()
def test_features_equal_open_clip(name):
    pytest.importorskip("open_clip", reason="open_clip is the reference")
    state = random_state_dict(REFERENCE[name])
    ours, theirs = build_model(state), open_clip_model(state)
    images, tokens = assert_features_equal(ours, theirs.encode_image, theirs.encode_text)
    logits, transposed = ours(images, tokens)
    expected, _ = theirs.get_logits(images, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)  # of logits up to 100
    assert torch.equal(transposed, logits.T)


@pytest.mark.parametrize("name", TINY)
def test_build_model_copies_state_dict(name):
    state, rng_state = random_state_dict(TINY[name]), torch.get_rng_state()
    before = copy.deepcopy(state)
    model = build_model(state)
    assert torch.equal(torch.get_rng_state(), rng_state)
    assert model.visual.input_resolution == TINY[name]["image_resolution"]
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad and p.is_contiguous() for p in model.parameters())
    copied = model.state_dict()
    assert copied.keys() == state.keys() - set(EXTRA_KEYS)
    assert all(torch.equal(copied[key], state[key]) for key in copied)
    for value in copied.values():
        value.zero_()
    assert all(torch.equal(state[key], before[key]) for key in before)


def test_initialization_is_the_published():
    model = CLIP(**TINY_VIT)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    for stack, width, layers in ((model.visual.transformer, 128, 4), (model.transformer, 64, 2)):
        attn, mlp = stack.resblocks[0].attn, stack.resblocks[0].mlp
        weights = attn.in_proj_weight, mlp.c_fc.weight, attn.out_proj.weight, mlp.c_proj.weight
        residual = (2 * layers * width) ** -0.5
        expected = [width**-0.5, (2 * width) ** -0.5, residual, residual]
        assert [weight.std().item() for weight in weights] == pytest.approx(expected, rel=0.05)
    assert 0.3 < model.encode_image(torch.randn(3, 3, 32, 32)).std() < 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logit_scale": None}, 'Missing key.*"logit_scale"'),
        ({"head.weight": torch.zeros(2)}, "Unexpected key.*head.weight"),
        ({"visual.conv1.weight": torch.zeros(5)}, "no CLIP can be built"),
        ({"visual.positional_embedding": torch.zeros(16, 128)}, "size mismatch for visual.posit"),
        ({"visual.conv1.weight": None}, "'visual.conv1.weight' is missing"),
    ],
)
def test_wrong_state_dict_is_named(changes, words):
    state = random_state_dict(TINY_VIT) | changes
    with pytest.raises(ValueError, match=words) as caught:
        build_model({key: value for key, value in state.items() if value is not None})
    assert "\n" not in str(caught.value)


def test_heads_must_share_the_width():
    with pytest.raises(ValueError, match=r"\(3, 1\) attention heads cannot share widths of \(128"):
        build_model(random_state_dict(TINY_VIT), heads=(3, 1))


def test_extra_buffers_are_optional():
    state = random_state_dict(TINY_RESNET)
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    state["transformer.resblocks.0.attn_mask"] = torch.zeros(16, 16)
    assert build_model(state).visual.bn1.num_batches_tracked.item() == 0
