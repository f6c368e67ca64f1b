"""Checkpoints of open_clip and transformers: the features are those of their own models."""

import argparse
import json
from collections import defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_helpers import TINY_VIT, assert_features_equal, random_state_dict

import clip
from clip import model_config

VARIANTS = [(160, 2, "quickgelu"), (264, 3, "gelu")]  # width and heads of both towers, activation


def open_clip_reference(folder, width, heads, activation, text):
    """open_clip's model, and its checkpoint with the configuration that push_to_hf_hub writes."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is the reference")
    config = {
        "embed_dim": 64, "quick_gelu": activation == "quickgelu",
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


def transformers_reference(folder, width, heads, activation, end):
    """transformers' model, its configuration, and the checkpoint that older versions wrote."""
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
    config.save_pretrained(folder)
    positions = {f"{tower}_model.embeddings.position_ids": torch.arange(9) for tower in
                 ("text", "vision")}  # fmt: skip
    torch.save(model.state_dict() | positions, folder / "pytorch_model.bin")

    def features(output):  # until version 4 a tensor
        return output if isinstance(output, torch.Tensor) else output.pooler_output

    return (
        lambda images: features(model.get_image_features(pixel_values=images)),
        lambda tokens: features(model.get_text_features(input_ids=tokens)),
    )


@pytest.mark.parametrize(("width", "heads", "activation"), VARIANTS)
@pytest.mark.parametrize("text", [False, True], ids=["plain", "text"])
def test_open_clip_checkpoint_features(tmp_path, width, heads, activation, text):
    reference = open_clip_reference(tmp_path, width, heads, activation, text)
    model, _ = clip.load(tmp_path, "cpu")
    assert_features_equal(model, *reference)
    assert model.image_mean == (0.5, 0.4, 0.3) and model.image_std == (0.2, 0.3, 0.4)
    # Without the configuration the arguments say the same.
    (tmp_path / "open_clip_config.json").unlink()
    model, _ = clip.load(tmp_path, "cpu", activation=activation, heads=(heads, heads))
    assert_features_equal(model, *reference)


@pytest.mark.parametrize(("width", "heads", "activation"), VARIANTS)
@pytest.mark.parametrize("end", [2, 513])  # the old 2 means to transformers the highest token
def test_transformers_checkpoint_features(tmp_path, width, heads, activation, end, capsys):
    reference = transformers_reference(tmp_path, width, heads, activation, end)
    assert_features_equal(clip.load(tmp_path, "cpu")[0], *reference)
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize("name", [*clip.available_models()[:9], "ViT-bigG-14", "ViT-S-32-alt"])
def test_all_sizes_match_open_clip(name):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is the reference")
    config = open_clip.get_model_config(name.replace("/", "-").replace("@336px", "-336"))
    with torch.device("meta"):
        theirs = open_clip.CLIP(**config).state_dict()
    parsed = model_config.from_open_clip_config({"model_cfg": config}, name)
    model = clip.build_model(theirs, parsed.activation, parsed.heads)
    assert (model.activation, model.heads) == ("gelu", parsed.heads)
    assert model.visual.input_resolution == config["vision_cfg"]["image_size"]
    assert name not in clip.available_models() or model.heads == clip.build_model(theirs).heads
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


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("heads", [None, (4, 4)])
def test_load_prints_assumptions(tiny, activation, heads, capsys):
    model, _ = clip.load(tiny, "cpu", activation=activation, heads=heads)
    assert model.activation == (activation or "quickgelu")
    assert model.heads == (heads or (2, 1))
    assumed = f"assuming {model.activation} and {model.heads[0]} and {model.heads[1]} attention"
    assert (assumed in capsys.readouterr().err) == (activation is None or heads is None)


def test_config_overrules_arguments(tiny, capsys):
    write_config(tiny, CONFIG)
    for activation, heads in (("gelu", (4, 4)), ("quickgelu", (2, 1))):
        model, _ = clip.load(tiny, "cpu", activation=activation, heads=heads)
        assert (model.activation, model.heads) == ("gelu", (4, 4))
    assert [line.rpartition("; ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "ignoring quickgelu", "ignoring (2, 1)",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="must be quickgelu or gelu, not 'relu'"):
        clip.load(tiny, activation="relu")


def test_transformers_config_defaults(tiny):
    config = {"model_type": "clip", "vision_config": {"hidden_size": 128, "patch_size": 8,
              "num_hidden_layers": 4, "num_attention_heads": 8}, "text_config_dict":
              {"hidden_size": 64, "num_hidden_layers": 2}}  # fmt: skip
    processor = {"image_mean": [0, 0.1, 0.2], "image_std": [1, 2, 3]}
    write_config(tiny, config, "config.json")
    write_config(tiny, processor, "preprocessor_config.json")
    model, preprocess = clip.load(tiny, "cpu")
    assert (model.activation, model.heads) == ("quickgelu", (8, 8))
    assert (model.image_mean, model.image_std) == ((0, 0.1, 0.2), (1, 2, 3))
    assert preprocess.transforms[-1].mean == model.image_mean
    for others in ({"learning_rate": 1}, [1]):  # another program's
        write_config(tiny, others, "config.json")
        assert clip.load(tiny, "cpu")[0].heads == (2, 1)
    write_config(tiny, CONFIG | {"preprocess_cfg": {"mean": None, "std": None}})
    assert clip.load(tiny, "cpu")[0].image_mean == clip.OPENAI_MEAN


OPEN_CLIP_JSON, HF_JSON = "open_clip_config.json", "config.json"


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        (OPEN_CLIP_JSON, {"vision_cfg": {"timm_model_name": "no_vit"}}, "cannot build .*no_vit"),
        (OPEN_CLIP_JSON, {"text_cfg": {"pool_type": "last"}}, "its own configuration"),
        (OPEN_CLIP_JSON, {"text_cfg": 5}, "cannot be used .*move it away"),
        (HF_JSON, {"model_type": "siglip"}, "describes a 'siglip' of transformers"),
        (HF_JSON, {"vision_config": {"hidden_act": "gelu"}}, "activations .'gelu', 'quick_gelu'"),
        (HF_JSON, "{", "config.json cannot be used"),
    ],
)
def test_unsupported_config_is_refused(tiny, name, config, words):
    if name == OPEN_CLIP_JSON:
        config = {"model_cfg": CONFIG["model_cfg"] | config}
    write_config(tiny, config, name)
    with pytest.raises(ValueError, match=words):
        clip.load(tiny, "cpu")


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


STATE = random_state_dict(TINY_VIT)
ROW = torch.zeros(4, 64)
OTHER = dict.fromkeys(STATE, ROW)  # averaged weights, or those of an optimizer
INNER = {key.replace("visual.", "visual._orig_mod."): STATE[key] for key in STATE}


@pytest.mark.parametrize(
    ("content", "removed"),
    [
        (STATE, ()),
        ({"state_dict": under("module.", STATE), "epoch": 3}, ("state_dict.module.",)),
        (under("module._orig_mod.", STATE), ("module._orig_mod.",)),
        (under("clip_model.", STATE) | {"head.weight": ROW}, ("clip_model.",)),
        ({"module": STATE, "optimizer": {"exp_avg": OTHER}}, ("module.",)),
        ({"model_ema": OTHER, "model": STATE}, ("model.",)),
        ({"state_dict": under("ema_model.", OTHER) | under("clip.", STATE)}, ("state_dict.clip.",)),
        ({"a": {"b": under("net.clip.", STATE)}}, ("a.b.net.clip.",)),
        ({"ema": OTHER, "net": INNER}, ("net.", "_orig_mod.")),
    ],
)
def test_prefix_and_nesting_are_named(tmp_path, capsys, content, removed):
    torch.save(content, tmp_path / "x.pt")
    read = clip.read_checkpoint(tmp_path / "x.pt")
    assert read.keys() == STATE.keys()
    assert all(torch.equal(read[key], STATE[key]) for key in STATE)
    err = capsys.readouterr().err
    assert err.count("\n") == bool(removed) and all(repr(name) in err for name in removed)


def test_foreign_objects_are_passed_over(tmp_path):
    extras = {
        "args": argparse.Namespace(lr=1, path=Path("x"), other=[{1, 2}, (slice(3), 1j, b"bytes")]),
        "best": np.float64(3.0),
        "array": np.arange(3),
        "history": defaultdict(list, loss=deque([1.0])),
    }
    torch.save({**extras, "state_dict": STATE}, tmp_path / "x.pt")
    read = clip.read_checkpoint(tmp_path / "x.pt")
    assert all(torch.equal(read[key], STATE[key]) for key in STATE)


REFUSED = {  # what fine-tuners end up with, and the way out
    "peft adapter": ({"base_model.model.a.lora_A.weight": ROW}, "merge_and_unload"),
    "unmerged peft": ({**STATE, "visual.attn.q_proj.base_layer.weight": ROW}, "merge_and_unload"),
    "clip-lora": ({"weights": {"layer_0": {"q_proj": {"w_lora_A": ROW}}}}, "CLIP-LoRA's code"),
    "text only": ({"model": {"token_embedding.weight": ROW}}, "only the text"),
    "image only": ({k: v for k, v in STATE.items() if k.startswith("visual.")}, "only the image"),
    "hf image only": ({"x.vision_model.embeddings.patch_embedding.weight": ROW}, "only the image"),
    "coop": ({"model": {"prompt_learner.token_suffix": ROW}}, "name the backbone"),
    "coop's own file": ({"state_dict": {"ctx": ROW, "token_prefix": ROW}}, "name the backbone"),
    "gmp": ({**STATE, "visual.transformer.resblocks.0.mlp.c_fc.r": ROW}, "GmP"),
    "eva": ({**STATE, "visual.blocks.0.attn.q_proj.weight": ROW}, "open_clip:EVA"),
    "long clip": ({**STATE, "positional_embedding_res": ROW}, "rows 0-19"),
    "siglip": ({**STATE, "logit_bias": ROW}, "SigLIP .*open_clip_config.json"),
    "coca": ({**STATE, "text_decoder.ln.weight": ROW}, "CoCa"),
    "timm": ({**STATE, "visual.trunk.blocks.0.weight": ROW}, "timm trunk"),
    "bert": ({**STATE, "text.transformer.embeddings.weight": ROW}, "Hugging Face text tower"),
}


@pytest.mark.parametrize("content, words", REFUSED.values(), ids=REFUSED)
def test_refused_checkpoints_name_the_remedy(content, words, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=f"model.pt cannot be used.*{words}"):
        clip.load(tmp_path / "model.pt", "cpu")
