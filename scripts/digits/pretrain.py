"""Pre-train the tiny CLIP that this repository ships, on glyphs that it draws as it goes.

    python scripts/digits/pretrain.py --seed 1 --out ViT-Tiny-8.pt

Images: the glyphs of glyphs.py, distorted at random. Captions: "a photo of a seven.", "a drawing of
a red capital b.". It never sees handwriting; the validation part of the digits
(datasets/digits.py), with the prompt "a photo of a {}.", is only measured.
"""

import argparse
import hashlib
import io
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from digits import glyphs

from clip import CLIP
from datasets import digits
from run_utils import path_arg
from utils import Progress, atomic_write

MODEL_ARGS = {
    "embed_dim": 64, "image_resolution": 32, "vision_layers": 4, "vision_width": 128,
    "vision_patch_size": 8, "context_length": 32, "vocab_size": 514, "transformer_width": 64,
    "transformer_layers": 2,
}  # fmt: skip
DIGIT_WEIGHT = 3.0  # how much more often a digit is drawn than another class
TEMPLATES = (
    *("a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "an image of a {}."),
    *("a drawing of a {}.", "a sketch of a {}.", "a print of a {}.", "a sign of a {}."),
    *("a {}.", "the {}."),
)
COLOR_CAPTION_PROB = 0.25  # that a caption names the color
BATCH_SIZE = 128
LR, WARMUP_STEPS, WEIGHT_DECAY, LOGIT_SCALE_LR_FACTOR = 1.5e-3, 100, 0.05, 5.0
# Share of the steps in which the distortions grow to their full strength. At full strength from
# the start, the loss does not fall for the first thousand steps.
RAMP_FRACTION = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="of the weights and of all data")
    parser.add_argument("--steps", type=int, default=3000, help="batches of 128")
    parser.add_argument("--out", type=path_arg, default=Path("ViT-Tiny-8.pt"), help="checkpoint")
    parser.add_argument("--threads", type=int, default=1, help="no more than there are free cores")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.out, args.seed, args.steps)


def train(out: Path, seed: int, steps: int) -> None:
    """Pre-train a model and write its checkpoint to `out`."""
    torch.manual_seed(seed)
    model = CLIP(**MODEL_ARGS)
    dataset = GlyphCaptionDataset(model)
    generator = Generator().manual_seed(seed)
    others = [value for name, value in model.named_parameters() if name != "logit_scale"]
    groups = [{"params": others, "factor": 1.0}]
    groups += [{"params": [model.logit_scale], "factor": LOGIT_SCALE_LR_FACTOR, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    progress = Progress(range(steps), desc="Pre-training", unit="step")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, steps) * group["factor"]
        strength = min(1.0, step / (RAMP_FRACTION * steps))
        images, tokens, is_match = dataset.batch(strength, generator)
        image_features = F.normalize(model.encode_image(images), dim=-1)
        text_features = F.normalize(model.encode_text(tokens), dim=-1)
        logits = model.logit_scale.exp() * image_features @ text_features.T  # (B, U)
        loss = contrastive_loss(logits, is_match)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    data = checkpoint_bytes(model)
    atomic_write(out, data)
    print(f"{out}: {len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
    accuracy = glyphs.zero_shot_accuracy(model, *validation_images(), digits.CLASSNAMES)
    print(f"Zero-shot accuracy on the digits for validation: {accuracy:.2f} %")


def get_lr(step: int, steps: int) -> float:
    """Return the learning rate: a linear warm-up, then a cosine to zero."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return LR * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def validation_images() -> tuple[Tensor, Tensor]:
    """Return the digits for validation: normalized images (359, 3, 32, 32) and labels (359,)."""
    pixels, labels = map(torch.from_numpy, digits.render())
    chosen = digits.split_indices(labels.numpy())["val"]
    return glyphs.normalize(pixels[chosen, None].expand(-1, 3, -1, -1) / 255), labels[chosen]


class GlyphCaptionDataset:
    """Endless batches of glyphs and captions, of which `captions` has all as token rows (M, 32)."""

    def __init__(self, model: CLIP):
        self.distances, labels = glyphs.draw_glyphs()
        self.first = torch.searchsorted(labels, torch.arange(len(glyphs.CLASSNAMES)))
        self.count = torch.bincount(labels)
        self.weights = torch.ones(len(glyphs.CLASSNAMES))
        self.weights[: len(digits.CLASSNAMES)] = DIGIT_WEIGHT
        texts = [
            template.format(color + name).replace("a orange", "an orange")
            for name in glyphs.CLASSNAMES
            for color in ["", *(f"{color} " for color in glyphs.COLORS)]
            for template in TEMPLATES
        ]
        self.captions = model.tokenize(texts)

    def batch(self, strength: float, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw images (B, 3, 32, 32), their different captions (U, L), and which match (B, U)."""
        classes = torch.multinomial(self.weights, BATCH_SIZE, replacement=True, generator=generator)
        fonts = (torch.rand(BATCH_SIZE, generator=generator) * self.count[classes]).long()
        distances = self.distances[self.first[classes] + fonts]
        images, colors = glyphs.render_glyphs(distances, strength, generator)

        names_color = torch.rand(BATCH_SIZE, generator=generator) < COLOR_CAPTION_PROB
        templates = torch.randint(len(TEMPLATES), (BATCH_SIZE,), generator=generator)
        per_class = len(TEMPLATES) * (1 + len(glyphs.COLORS))
        color_words = torch.where(names_color, colors + 1, 0)  # 0: no color
        captions = (classes * per_class + color_words * len(TEMPLATES) + templates).unique()  # (U,)
        caption_colors = captions % per_class // len(TEMPLATES) - 1
        is_color = (caption_colors == -1) | (caption_colors == colors[:, None])  # (B, U)
        is_match = (captions // per_class == classes[:, None]) & is_color
        tokens = self.captions[captions]
        length = int(tokens.argmax(dim=1).max()) + 1  # nothing follows the end of a text
        return glyphs.normalize(images), tokens[:, :length], is_match


def contrastive_loss(logits: Tensor, is_match: Tensor) -> Tensor:
    """Return CLIP's symmetric loss of similarities (B, U), where a row has one match or several."""
    loss = torch.zeros(())
    for scores, match in ((logits, is_match), (logits.T, is_match.T)):
        target = match / match.sum(dim=1, keepdim=True)
        loss = loss + F.cross_entropy(scores, target) / 2
    return loss


def checkpoint_bytes(model: CLIP) -> bytes:
    """Return the file to ship: OpenAI's layout, fp16, readable with weights_only=True."""
    state = {key: value.half() for key, value in model.state_dict().items()}
    for key in ("input_resolution", "context_length", "vocab_size"):
        state[key] = torch.tensor(MODEL_ARGS[key.replace("input", "image")])
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
