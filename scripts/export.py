"""Export the CLIP of a run for other programs (docs/export.md).

    python scripts/export.py RUN_FOLDER --to onnx --out classifier_folder

RUN_FOLDER may also be its weights.safetensors, or a full CLIP checkpoint, except for onnx, which
needs the class names and prompts of the run.
"""

import importlib.util
import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import reporting  # noqa: F401  (puts the repository on the path)
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clip
from clip import CLIP
from clip.convert import convert_to_hf, infer_model_args
from clip.model_config import HF_ACTIVATIONS
from clip.resnet import TOTAL_STRIDE
from clip.simple_tokenizer import END, START, SimpleTokenizer
from clip.zero_shot import ZeroShotClassifier, tokenize_class_prompts
from optimizers.delta import apply_delta, read_delta
from run_utils import OneLineErrorParser, backbone_arg, path_arg
from runs.cli import run_cli
from runs.records import Run, read_run
from runs.weights import find_saved_run, resolve_base, save_state_dict

ONNX_README = """# Classifier

`classifier.onnx` maps RGB images (N, 3, {side}, {side}), float32 in [0, 1], to the probabilities
(N, {classes}) of the classes in `labels.json`. It normalizes the images itself.

```python
import json, pathlib
import numpy as np, onnxruntime
from PIL import Image, ImageOps
side, image = {side}, Image.open("image.jpg").convert("RGB")
{resize}
pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255
probabilities = onnxruntime.InferenceSession("classifier.onnx").run(None, {{"images": pixels}})[0]
print(json.loads(pathlib.Path("labels.json").read_bytes())[probabilities[0].argmax()])
```
"""

RESIZE_CODE = {
    "shortest": """\
width, height = (max(side, int(side * n / min(image.size))) for n in image.size)
left, top = round((width - side) / 2), round((height - side) / 2)
image = image.resize((width, height), Image.{0}).crop((left, top, left + side, top + side))""",
    "squash": "image = image.resize((side, side), Image.{0})",
    "longest": "image = ImageOps.pad(image, (side, side), Image.{0})",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineErrorParser(prog="export.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("source", type=path_arg, metavar="RUN_OR_WEIGHTS", help="folder of a run, or its weights")
    add("--to", choices=list(EXPORTERS), required=True)
    add("--out", type=path_arg, required=True, help="file (openai) or folder to write")
    add("--base", type=backbone_arg, help="name or path of the base (the one named by the weights)")
    args = parser.parse_args(argv)
    return run_cli(lambda: export(args.source, args.to, args.out, args.base), "export.py")


def export(source: Path, target: str, out: Path, base: str | None = None) -> None:
    """Write the CLIP of a run or of a weights file in the format of another program."""
    if out.exists():
        raise ValueError(f"--out {out} exists: give another path")
    model, run = load_source(source, base)
    if not isinstance(model, CLIP) and target not in ("open_clip", "onnx"):
        raise ValueError(f"{target} has no model with such towers: use --to open_clip or onnx")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export-", dir=out.parent) as folder:
        path = Path(folder, out.name)
        if target != "openai":
            path.mkdir()
        EXPORTERS[target](model, run, path)
        path.rename(out)
    print(f"Wrote {out}")


def load_source(source: Path, base: str | None) -> tuple[CLIP, Run | None]:
    """Load the trained CLIP in float32, with the logit scale of its run if there is one."""
    run, weights = None, source
    if source.is_dir():
        run, weights = find_saved_run(source)
    elif (source.parent / "result.json").is_file():
        run = read_run(source.parent)
    settings = run.config if run else {}
    options = {key: settings.get(key) for key in ("activation", "heads")}
    if weights.suffix == ".safetensors":
        delta = read_delta(weights)
        resolve_base(delta, base)  # a clear error if the base is missing
        model, _ = clip.load(base or delta.metadata["backbone"], "cpu", **options)
        apply_delta(model, delta)
    else:
        model, _ = clip.load(weights, "cpu", **options)
    if (scale := settings.get("logit_scale", "checkpoint")) != "checkpoint":
        model.logit_scale.data.fill_(math.log(scale))
    return model.requires_grad_(False), run


def to_openai(model: CLIP, run: Run | None, path: Path) -> None:
    """Write a state dict in OpenAI's layout, as `delta.py apply` does."""
    if model.settings != clip.build_model(model.state_dict()).settings:
        raise ValueError(
            "this CLIP has another activation, other heads or other image preprocessing than "
            "OpenAI's code gives to its weights: use --to open_clip"
        )
    save_state_dict(path, model.state_dict())


def to_open_clip(model: CLIP, run: Run | None, folder: Path) -> None:
    """Write a folder that open_clip loads as `local-dir:FOLDER`."""
    save_state_dict(folder / "open_clip_model.safetensors", model.state_dict())
    if not isinstance(model, CLIP):
        return model.save_config(folder)
    sizes, (vision_heads, text_heads) = infer_model_args(model.state_dict()), model.heads
    width, text_width = sizes["vision_width"], sizes["transformer_width"]
    channels = width if sizes["vision_patch_size"] else TOTAL_STRIDE * width  # of attention
    config = {
        "embed_dim": sizes["embed_dim"],
        "quick_gelu": model.activation == "quickgelu",
        "vision_cfg": {
            "image_size": sizes["image_resolution"],
            "layers": sizes["vision_layers"],
            "width": width,
            "head_width": channels // vision_heads,
            "patch_size": sizes["vision_patch_size"],
            "mlp_ratio": (sizes["vision_mlp"] or 4 * width) / width,
        },
        "text_cfg": {
            "context_length": sizes["context_length"],
            "vocab_size": sizes["vocab_size"],
            "layers": sizes["transformer_layers"],
            "width": text_width,
            "heads": text_heads,
            "mlp_ratio": sizes["transformer_mlp"] / text_width,
        },
    }
    preprocess = {"mean": model.image_mean, "std": model.image_std}
    preprocess["resize_mode"], preprocess["interpolation"] = model.image_resize
    write_json(folder / "open_clip_config.json", dict(model_cfg=config, preprocess_cfg=preprocess))


def to_transformers(model: CLIP, run: Run | None, folder: Path) -> None:
    """Write a folder that transformers' CLIPModel and CLIPProcessor load."""
    if hasattr(model.visual, "attnpool"):
        raise ValueError("transformers has no CLIP with a ResNet: use --to open_clip or onnx")
    sizes, side = infer_model_args(model.state_dict()), model.visual.input_resolution
    tokenizer = SimpleTokenizer.from_vocab_size(model.vocab_size)
    activation = {ours: theirs for theirs, ours in HF_ACTIVATIONS.items()}[model.activation]
    config = {
        "model_type": "clip",
        "projection_dim": sizes["embed_dim"],
        "vision_config": {
            "hidden_act": activation,
            "hidden_size": sizes["vision_width"],
            "intermediate_size": sizes["vision_mlp"],
            "num_hidden_layers": sizes["vision_layers"],
            "num_attention_heads": model.heads[0],
            "image_size": side,
            "patch_size": sizes["vision_patch_size"],
        },
        "text_config": {
            "hidden_act": activation,
            "hidden_size": sizes["transformer_width"],
            "intermediate_size": sizes["transformer_mlp"],
            "num_hidden_layers": sizes["transformer_layers"],
            "num_attention_heads": model.heads[1],
            "vocab_size": sizes["vocab_size"],
            "max_position_embeddings": sizes["context_length"],
            "bos_token_id": tokenizer.start,
            "eos_token_id": tokenizer.end,
        },
    }
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": model.image_mean,
        "image_std": model.image_std,
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }
    limit = {"tokenizer_class": "CLIPTokenizer", "model_max_length": model.context_length}
    names = {START: "<|startoftext|>", END: "<|endoftext|>"}
    vocabulary = {names.get(symbol, symbol): number for symbol, number in tokenizer.ids.items()}
    merges = ["#version: 0.2", *map(" ".join, tokenizer.ranks)]
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", preprocessor)
    write_json(folder / "tokenizer_config.json", limit)
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    save_state_dict(folder / "model.safetensors", convert_to_hf(model.state_dict()))


def to_onnx(model: CLIP, run: Run | None, folder: Path) -> None:
    """Write a folder with an ONNX classifier of the run's classes, its labels and a README."""
    if run is None:
        raise ValueError("--to onnx needs class names and prompts: name the folder of a run")
    has_packages = all(map(importlib.util.find_spec, ("onnx", "onnxscript")))
    if not has_packages or torch.__version__ < "2.5":
        raise ValueError("--to onnx needs packages: pip install onnx onnxscript 'torch>=2.5'")
    text_tokens = tokenize_class_prompts(model, run.classnames, run.template)
    classes = ZeroShotClassifier(model, text_tokens).encode_classes()  # (C, D)
    side = model.visual.input_resolution
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within the exporter
        torch.onnx.export(
            Classifier(model, classes).eval(),
            (torch.rand(2, 3, side, side),),
            folder / "classifier.onnx",
            output_names=["probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("N")}},
            dynamo=True,
            external_data=sum(p.nbytes for p in model.parameters()) > 1.9e9,  # of protobuf, 2 GiB
            verbose=False,
        )
    write_json(folder / "labels.json", run.classnames)
    mode, interpolation = model.image_resize
    resize = RESIZE_CODE[mode].format(interpolation.upper())
    readme = ONNX_README.format(side=side, classes=len(classes), resize=resize)
    (folder / "README.md").write_text(readme)


class Classifier(nn.Module):
    """Images (N, 3, R, R) in [0, 1] to probabilities (N, C), by class features (C, D)."""

    def __init__(self, model: CLIP, classes: Tensor) -> None:
        super().__init__()
        self.visual = model.visual
        self.register_buffer("mean", torch.tensor(model.image_mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(model.image_std).view(3, 1, 1))
        self.register_buffer("weight", model.logit_scale.exp() * classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.visual((images - self.mean) / self.std)
        features = features[0] if isinstance(features, tuple) else features  # CoCa has tokens, too
        return F.linear(F.normalize(features, dim=-1), self.weight).softmax(dim=-1)


def write_json(path: Path, content: object) -> None:
    """Write JSON that people can read, in UTF-8."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


EXPORTERS = dict(
    openai=to_openai, open_clip=to_open_clip, transformers=to_transformers, onnx=to_onnx
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
