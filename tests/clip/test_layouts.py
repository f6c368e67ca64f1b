"""Checkpoints of OpenAI, open_clip and transformers: the same features as their makers' models."""

import argparse
import json
from collections import OrderedDict

import numpy as np
import pytest
import torch
from clip_helpers import (
    TINY_RESNET,
    TINY_VIT,
    random_images,
    random_state_dict,
    random_tokens,
    relative_error,
)
from safetensors.torch import save_file

import clip
from clip.layouts import find_state, to_openai

HEADS = {64: 2, 80: 2, 88: 3, 104: 2}  # channels of a head: heads


def sizes(head_width):
    width = head_width * HEADS[head_width]
    return {**TINY_VIT, "vision_layers": 2, "vision_width": width, "transformer_width": width}


def open_clip_reference(folder, head_width, activation, text):
    """open_clip's model, and its checkpoint with the configuration that push_to_hf_hub writes."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is the reference")
    size, heads = sizes(head_width), HEADS[head_width]
    config = {
        "embed_dim": 64,
        "quick_gelu": activation == "quickgelu",
        "vision_cfg": {"image_size": 32, "layers": 2, "width": size["vision_width"],
                       "patch_size": 8, "head_width": head_width, "mlp_ratio": 4.3637},
        "text_cfg": {"context_length": 16, "vocab_size": 514, "layers": 2, "heads": heads,
                     "width": size["transformer_width"]},
    }  # fmt: skip
    torch.manual_seed(0)
    model = (open_clip.CustomTextCLIP if text else open_clip.CLIP)(**config).eval()
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return model.encode_image, model.encode_text


def transformers_reference(folder, head_width, activation, end=513):
    """transformers' model, saved by its own save_pretrained."""
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    size, heads = sizes(head_width), HEADS[head_width]
    act = {"quickgelu": "quick_gelu", "gelu": "gelu"}[activation]
    vision = {"hidden_size": size["vision_width"], "image_size": 32, "patch_size": 8}
    text = {"hidden_size": size["transformer_width"], "max_position_embeddings": 16}
    text |= {"vocab_size": 514, "eos_token_id": end, "bos_token_id": 512}
    both = {"intermediate_size": 300, "num_hidden_layers": 2, "num_attention_heads": heads,
            "hidden_act": act, "projection_dim": 64}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=text | both, vision_config=vision | both, projection_dim=64
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)

    def features(output):  # until version 4 a tensor
        return output if isinstance(output, torch.Tensor) else output.pooler_output

    return (
        lambda images: features(model.get_image_features(pixel_values=images)),
        lambda tokens: features(model.get_text_features(input_ids=tokens)),
    )


@torch.no_grad()
def assert_equal(path, reference, **kwargs):
    """The features of a loaded checkpoint are the reference's; the checkpoint's model."""
    model, _ = clip.load(path, "cpu", **kwargs)
    images, tokens = random_images(model), random_tokens(model)
    for ours, theirs, inputs in zip(
        (model.encode_image, model.encode_text), reference, (images, tokens), strict=True
    ):
        assert relative_error(ours(inputs), theirs(inputs)) < 1e-5
    return model


@pytest.mark.parametrize("head_width", HEADS)
@pytest.mark.parametrize("activation", ["gelu", "quickgelu"])
@pytest.mark.parametrize("text", [False, True], ids=["plain", "text"])
def test_open_clips_checkpoints_have_open_clips_features(tmp_path, head_width, activation, text):
    reference = open_clip_reference(tmp_path, head_width, activation, text)
    model = assert_equal(tmp_path, reference)
    assert model.image_mean == (0.5, 0.4, 0.3) and model.image_std == (0.2, 0.3, 0.4)
    # Without the configuration the arguments say the same.
    (tmp_path / "open_clip_config.json").unlink()
    assert_equal(tmp_path, reference, activation=activation, heads=(HEADS[head_width],) * 2)


@pytest.mark.parametrize("head_width", HEADS)
@pytest.mark.parametrize("activation", ["gelu", "quickgelu"])
def test_transformers_checkpoints_have_transformers_features(tmp_path, head_width, activation):
    reference = transformers_reference(tmp_path, head_width, activation)
    assert_equal(tmp_path, reference)
    assert_equal(tmp_path / "model.safetensors", reference)


@pytest.mark.parametrize("end", [2, 513])  # 2: until 2023, and then the highest id is meant
def test_older_files_of_transformers_are_read(tmp_path, end, capsys):
    reference = transformers_reference(tmp_path, 80, "gelu", end)
    state = {k: v.clone() for k, v in clip.files.load_file(tmp_path / "model.safetensors").items()}
    state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert_equal(tmp_path, reference)
    assert_equal(tmp_path / "pytorch_model.bin", reference)
    assert "note:" not in capsys.readouterr().err
