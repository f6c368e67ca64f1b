"""scripts/export.py: each format gives the run's logits in the program that it is for."""

import importlib.util
import json
import re
import shutil
from functools import partial

import export
import onnxruntime
import open_clip
import predict
import pytest
import torch
import torch.nn.functional as F
from clip_helpers import TINY_VIT, open_clip_model, random_state_dict, random_tokens
from commands import error_of, output_of
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

import clip
from clip.zero_shot import tokenize_class_prompts
from runs.weights import find_saved_run, load_run_model


def load_model(folder):
    return load_run_model(*find_saved_run(folder), torch.device("cpu")).requires_grad_(False)


def logits_of(model, images, tokens):
    images, texts = F.normalize(model.encode_image(images)), F.normalize(model.encode_text(tokens))
    return 20 * images @ texts.T


@pytest.fixture(params=["vit_run", "resnet_run"])
def run(request):
    """A run's folder, images and texts for its model, and their logits."""
    folder = request.getfixturevalue(request.param)
    model = load_model(folder)
    side = model.visual.input_resolution
    images, tokens = torch.randn(3, 3, side, side), random_tokens(model)
    return folder, images, tokens, logits_of(model, images, tokens)


def assert_close(ours, theirs):
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


write, error = (partial(f, export.main) for f in (output_of, error_of))


@torch.no_grad()
@pytest.mark.parametrize("target", ["openai", "open_clip"])
def test_export_matches_run(target, run, tmp_path):
    folder, images, tokens, expected = run
    write(folder, "--to", target, "--out", out := tmp_path / "a name")
    if target == "openai":
        theirs = open_clip_model(torch.load(out, weights_only=True))  # by its own loader
    else:
        theirs = open_clip.create_model(f"local-dir:{out}").eval()
    image_features, text_features, scale = theirs(images, tokens)
    assert_close(scale * image_features @ text_features.T, expected)
    assert_close(clip.load(out, "cpu")[0](images, tokens)[0], expected)


@torch.no_grad()
def test_transformers_export_matches_run(vit_run, tmp_path):
    write(vit_run, "--to", "transformers", "--out", out := tmp_path / "new" / "folder")
    theirs, processor = CLIPModel.from_pretrained(out), CLIPProcessor.from_pretrained(out)
    model = load_model(vit_run)
    texts, side = ["A photo of a cat.", "it's  naïve: 12 Œuvres"], model.visual.input_resolution
    image = Image.effect_noise((side, side), 80).convert("RGB")
    batch = processor(text=texts, images=image, return_tensors="pt", padding=True)
    pixels = clip.image_transform(side)(image)[None]
    expected = logits_of(model, pixels, model.tokenize(texts))
    assert_close(theirs(**batch).logits_per_image, expected)


@torch.no_grad()
def test_onnx_export_matches_run(run, data, tmp_path, monkeypatch, capsys):
    folder, images, *_ = run
    write(folder, "--to", "onnx", "--out", out := tmp_path / "classifier")
    model, (saved, _) = load_model(folder), find_saved_run(folder)
    assert json.loads((out / "labels.json").read_text()) == saved.classnames
    session = onnxruntime.InferenceSession(out / "classifier.onnx")
    prompts = tokenize_class_prompts(model, saved.classnames, saved.template)[0]
    normalize = clip.image_transform(1).transforms[-1]
    for batch in (images[:1].sigmoid(), images.sigmoid()):
        (probabilities,) = session.run(None, {"images": batch.numpy()})
        expected = logits_of(model, normalize(batch), prompts).softmax(dim=-1)
        assert_close(torch.from_numpy(probabilities), expected)
    monkeypatch.chdir(out)
    shutil.copy(next((data / "eurosat/2750").rglob("*.jpg")), "image.jpg")
    (code,) = re.findall("```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    exec(code, {})
    printed = capsys.readouterr().out.strip()
    assert output_of(predict.main, folder, "image.jpg", "--top", 1).split("  ")[1] == printed


@torch.no_grad()
def test_export_keeps_other_architectures(tmp_path):
    preprocess = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    vision = {"layers": 4, "width": 128, "patch_size": 8, "head_width": 32}
    text = {"layers": 2, "width": 64, "heads": 2}
    config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}  # with GELU
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    export.write_json(tmp_path / "open_clip_config.json", content)
    torch.save(random_state_dict(TINY_VIT), source := tmp_path / "weights.pt")
    model = clip.load(source, "cpu")[0]
    images, tokens = torch.randn(2, 3, 32, 32), random_tokens(model)
    for target in ("open_clip", "transformers"):
        write(source, "--to", target, "--out", tmp_path / target)
        assert clip.load(tmp_path / target, "cpu")[0].settings == model.settings
    assert model.settings == ["gelu", (4, 2), *preprocess.values()]
    folder, image = tmp_path / "open_clip", Image.effect_noise((90, 70), 80).convert("RGB")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert_close(theirs.eval().encode_image(images), model.encode_image(images))
    assert torch.equal(preprocess(image), clip.load(folder, "cpu")[1](image))
    theirs = CLIPModel.from_pretrained(tmp_path / "transformers")
    assert_close(theirs(pixel_values=images, input_ids=tokens)[0], model(images, tokens)[0])
    out = tmp_path / "out.pt"
    assert "this CLIP has another activation" in error(source, "--to", "openai", "--out", out)


def test_export_errors_are_one_line(vit_run, resnet_run, tmp_path, monkeypatch):
    shutil.copytree(vit_run, bare := tmp_path / "bare")
    (bare / "mine.safetensors").unlink()
    shutil.copy(vit_run / "mine.safetensors", weights := tmp_path / "weights.safetensors")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for words, source, target, out in (
        ("has no weights", bare, "openai", "out"),
        (f"--out {bare} exists", vit_run, "open_clip", "bare"),
        ("no CLIP with a ResNet", resnet_run, "transformers", "out"),
        ("name the folder of a run", weights, "onnx", "out"),
        ("pip install onnx onnxscript", vit_run, "onnx", "out"),
    ):
        assert words in error(source, "--to", target, "--out", tmp_path / out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "weights.safetensors"]
