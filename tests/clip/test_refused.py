"""Checkpoints that fine-tuners of CLIP end up with: taken, or refused with a way out."""

import pytest
import torch
from clip_helpers import TINY_VIT, random_state_dict

import clip
from clip.files import find_weight_file
from clip.loading import validate_name

STATE = random_state_dict(TINY_VIT)
ROW = torch.zeros(4, 64)
CASES = {
    "peft adapter": ({"base_model.model.a.lora_A.weight": ROW}, "merge_and_unload"),
    "unmerged peft": ({**STATE, "visual.attn.q_proj.base_layer.weight": ROW}, "merge_and_unload"),
    "clip-lora": ({"weights": {"layer_0": {"q_proj": {"w_lora_A": ROW}}}}, "CLIP-LoRA's code"),
    "text only": ({k: v for k, v in STATE.items() if not k.startswith("visual.")}, "only the text"),
    "image only": ({k: v for k, v in STATE.items() if k.startswith("visual.")}, "only the image"),
    "coop": (
        {"prompt_learner.ctx": ROW, "image_encoder.conv1.weight": ROW, "logit_scale": ROW[0, 0]},
        "name the backbone",
    ),
    "gmp": ({**STATE, "visual.transformer.resblocks.0.mlp.c_fc.r": ROW}, "GmP"),
    "eva": ({**STATE, "visual.blocks.0.attn.q_proj.weight": ROW}, "open_clip:EVA"),
    "long clip": ({**STATE, "positional_embedding_res": ROW}, "rows 0-19"),
    "siglip": ({**STATE, "logit_bias": ROW}, "SigLIP .*open_clip_config.json"),
    "coca": ({**STATE, "text_decoder.ln.weight": ROW}, "CoCa"),
    "timm": ({**STATE, "visual.trunk.blocks.0.weight": ROW}, "timm trunk"),
    "bert": ({**STATE, "text.transformer.embeddings.weight": ROW}, "Hugging Face text tower"),
}


@pytest.mark.parametrize("content, words", CASES.values(), ids=CASES)
def test_refused_checkpoints_name_the_remedy(content, words, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=words) as error:
        clip.load(tmp_path / "model.pt", "cpu")
    assert str(tmp_path / "model.pt") in str(error.value)


def test_folders_are_searched_deeper(tmp_path):
    file = tmp_path / "out" / "checkpoint-5" / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    assert find_weight_file(tmp_path / "out") == file
    other = tmp_path / "out" / "checkpoint-9" / "model.safetensors"
    other.parent.mkdir()
    other.touch()
    with pytest.raises(FileNotFoundError, match="name one of .*checkpoint-5.*checkpoint-9"):
        find_weight_file(tmp_path / "out")


def test_hub_names_say_how(tmp_path):
    with pytest.raises(ValueError, match="hf download ORG/NAME --local-dir FOLDER"):
        validate_name("hf-hub:ORG/NAME")
    (tmp_path / "a.pt").touch()
    validate_name(f"local-dir:{tmp_path}")
