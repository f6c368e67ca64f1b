"""Checkpoints of open_clip and transformers: the features are those of their own models."""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clip_helpers import (
    CONFIGS,
    TINY_VIT,
    random_images,
    random_state_dict,
    random_tokens,
    relative_error,
)
from safetensors.torch import load_file

import clip
from clip import convert, model_config

VARIANTS = [(160, 2, "quickgelu"), (264, 3, "gelu")]  # width and heads of both towers, activation


def open_clip_reference(folder, width, heads, activation, text):
    """open_clip's model, and its checkpoint with the configuration that push_to_hf_hub writes."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is the reference")
    config = {
        "embed_dim": 64,
        "quick_gelu": activation == "quickgelu",
        "vision_cfg": {"image_size": 32, "layers": 2, "width": width, "patch_size": 8,
                       "head_width": width // heads, "mlp_ratio": 4.3637},
        "text_cfg": {"context_length": 16, "vocab_size": 514, "layers": 2, "heads": heads,
                     "width": width},
    }  # fmt: skip
    model = (open_clip.CustomTextCLIP if text else open_clip.CLIP)(**config).eval()
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return model.encode_image, model.encode_text


def transformers_reference(folder, width, heads, activation, end=513):
    """transformers' model, saved by its own save_pretrained."""
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    both = {"intermediate_size": 300, "num_hidden_layers": 2, "num_attention_heads": heads,
            "hidden_size": width, "projection_dim": 64,
            "hidden_act": {"quickgelu": "quick_gelu", "gelu": "gelu"}[activation]}  # fmt: skip
    vision = both | {"image_size": 32, "patch_size": 8}
    text = both | {"max_position_embeddings": 16, "vocab_size": 514, "eos_token_id": end}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
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
    """Compare the features of a loaded checkpoint with the reference's; return its model."""
    model, _ = clip.load(path, "cpu", **kwargs)
    images, tokens = random_images(model), random_tokens(model)
    assert relative_error(model.encode_image(images), reference[0](images)) < 1e-5
    assert relative_error(model.encode_text(tokens), reference[1](tokens)) < 1e-5
    return model


@pytest.mark.parametrize(("width", "heads", "activation"), VARIANTS)
@pytest.mark.parametrize("text", [False, True], ids=["plain", "text"])
def test_open_clip_checkpoint_features(tmp_path, width, heads, activation, text):
    reference = open_clip_reference(tmp_path, width, heads, activation, text)
    model = assert_equal(tmp_path, reference)
    assert model.image_mean == (0.5, 0.4, 0.3) and model.image_std == (0.2, 0.3, 0.4)
    # Without the configuration the arguments say the same.
    (tmp_path / "open_clip_config.json").unlink()
    assert_equal(tmp_path, reference, activation=activation, heads=(heads, heads))


@pytest.mark.parametrize(("width", "heads", "activation"), VARIANTS)
def test_transformers_checkpoint_features(tmp_path, width, heads, activation):
    reference = transformers_reference(tmp_path, width, heads, activation)
    assert_equal(tmp_path, reference)


def test_old_transformers_checkpoint_features(tmp_path, capsys):
    # Until 2023 the end of a text was token 2, by which transformers means the highest one.
    reference = transformers_reference(tmp_path, 160, 2, "gelu", end=2)
    state = {k: v.clone() for k, v in load_file(tmp_path / "model.safetensors").items()}
    state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert_equal(tmp_path / "pytorch_model.bin", reference)
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize("name", [*CONFIGS, "ViT-bigG-14", "ViT-S-32-alt"])
def test_all_sizes_match_open_clip(name):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is the reference")
    config = open_clip.get_model_config(name.replace("/", "-").replace("@336px", "-336"))
    with torch.device("meta"):
        theirs = open_clip.CLIP(**config).state_dict()
    parsed = model_config.from_open_clip_config({"model_cfg": config}, name)
    assert CONFIGS.get(name, {}).items() <= convert.infer_model_args(theirs).items()
    model = clip.build_model(theirs, parsed.activation, parsed.heads)
    assert (model.activation, model.heads) == ("gelu", parsed.heads)
    assert name not in CONFIGS or parsed.heads == clip.build_model(theirs).heads
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.items()}


TOWER = {"width": 128, "layers": 4, "patch_size": 8, "head_width": 32}
CONFIG = {"model_cfg": {"embed_dim": 64, "vision_cfg": TOWER,
          "text_cfg": {"width": 64, "layers": 2, "heads": 4}}}  # fmt: skip


@pytest.fixture
def tiny(tmp_path):
    """The path of a checkpoint in OpenAI's layout that is not OpenAI's."""
    torch.save(random_state_dict(TINY_VIT), tmp_path / "x.pt")
    return tmp_path / "x.pt"


def write_config(path, content, name="open_clip_config.json"):
    path.with_name(name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_load_prints_assumptions(tiny, capsys):
    for arguments, assumed in (
        ({}, "assuming quickgelu and 2 and 1 attention heads (image and text tower)"),
        ({"activation": "gelu"}, "assuming gelu and 2 and 1 attention heads"),
        ({"heads": (4, 4)}, "assuming quickgelu and 4 and 4 attention heads"),
        ({"activation": "gelu", "heads": (4, 4)}, ""),
    ):
        model, _ = clip.load(tiny, "cpu", **arguments)
        assert model.activation == arguments.get("activation", "quickgelu")
        assert model.heads == arguments.get("heads", (2, 1))
        err = capsys.readouterr().err
        assert err.count("\n") == bool(assumed) and assumed in err


def test_config_overrules_arguments(tiny, capsys):
    write_config(tiny, CONFIG)
    model, _ = clip.load(tiny, "cpu", activation="gelu", heads=(4, 4))
    assert (model.activation, model.heads) == ("gelu", (4, 4))
    assert capsys.readouterr().err == ""
    model, _ = clip.load(tiny, "cpu", activation="quickgelu", heads=(2, 1))
    assert (model.activation, model.heads) == ("gelu", (4, 4))
    err = capsys.readouterr().err
    assert "open_clip_config.json says gelu; ignoring quickgelu" in err
    assert "says (4, 4); ignoring (2, 1)" in err


def test_transformers_config_defaults(tiny):
    config = {"model_type": "clip", "vision_config": {"hidden_size": 128, "patch_size": 8,
              "num_hidden_layers": 4, "num_attention_heads": 8}, "text_config_dict":
              {"hidden_size": 64, "num_hidden_layers": 2}}  # fmt: skip
    write_config(tiny, config, "config.json")
    write_config(
        tiny, {"image_mean": [0, 0.1, 0.2], "image_std": [1, 2, 3]}, "preprocessor_config.json"
    )
    model, preprocess = clip.load(tiny, "cpu")
    assert (model.activation, model.heads) == ("quickgelu", (8, 8))
    assert (model.image_mean, model.image_std) == ((0, 0.1, 0.2), (1, 2, 3))
    assert preprocess.transforms[-1].mean == model.image_mean
    write_config(tiny, {"learning_rate": 1}, "config.json")  # another program's
    assert clip.load(tiny, "cpu")[0].heads == (2, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_cfg": {"timm_model_name": "vit_base"}}, "open_clip cannot build .*vit_base"),
        ({"text_cfg": {"pool_type": "last"}}, "x.pt does not hold the weights of .*own config"),
        ({"vision_cfg": {"head_width": 0}}, "cannot be understood"),
        ({"text_cfg": 5}, "cannot be understood"),
    ],
)
def test_unsupported_open_clip_config(tiny, change, words):
    write_config(tiny, {"model_cfg": CONFIG["model_cfg"] | change})
    with pytest.raises(ValueError, match=words):
        clip.load(tiny, "cpu")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "siglip"}, "describes a 'siglip' of transformers"),
        ({"vision_config": {"hidden_act": "gelu"}}, "activations gelu, quick_gelu, which is not"),
        ("{", "config.json cannot be read"),
    ],
)
def test_unsupported_transformers_config(tiny, config, words):
    write_config(tiny, config, "config.json")
    with pytest.raises(ValueError, match=words):
        clip.load(tiny, "cpu")


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda s: s, ""),
        (lambda s: {"state_dict": under("module.", s), "epoch": 3},
         "below 'state_dict', without the prefix 'module.'"),
        (lambda s: under("module._orig_mod.", s), "without the prefix 'module._orig_mod.'"),
        (lambda s: {"model_state_dict": s, "loss": torch.tensor(1.0)}, "below 'model_state_dict'"),
        (lambda s: {"model": s, "best": torch.tensor(3.0)}, "below 'model'"),
        (lambda s: under("clip_model.", s) | {"head.weight": torch.zeros(2)},
         "without the prefix 'clip_model.', leaving out head.weight"),
        (lambda s: {"ema": dict(s), "model": s}, "below 'model', not 'ema'"),
        (lambda s: {"a": {"b": under("net.clip.", s)}}, "below 'a.b', without the prefix 'net.cl"),
        (lambda s: {k.replace("resblocks.0.", "resblocks.0._orig_mod."): v for k, v in s.items()},
         "without '_orig_mod.' inside names"),
    ],
)  # fmt: skip
def test_prefix_and_nesting_are_named(tmp_path, capsys, wrap, note):
    state = random_state_dict(TINY_VIT)
    torch.save(wrap(state), tmp_path / "x.pt")
    read = clip.read_checkpoint(tmp_path / "x.pt")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)
    err = capsys.readouterr().err
    assert err.count("\n") == bool(note) and note in err


def test_foreign_objects_are_passed_over(tmp_path):
    Settings = type("Settings", (dict,), {"__module__": "their_project"})
    extras = {
        "args": argparse.Namespace(lr=1, path=Path("x")),
        "best": np.float64(3.0),
        "array": np.arange(3),
        "settings": Settings(a=[{1, 2}], b=(slice(3), 1j, b"bytes")),
        "history": defaultdict(list, loss=[1.0]),
    }
    state = random_state_dict(TINY_VIT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "their_project", SimpleNamespace(Settings=Settings))
        torch.save({**extras, "state_dict": state}, tmp_path / "x.pt")
    read = clip.read_checkpoint(tmp_path / "x.pt")
    assert all(torch.equal(read[key], state[key]) for key in state)
