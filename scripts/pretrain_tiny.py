"""Pre-train the tiny CLIP that this repository ships, on printed signs drawn as it goes.

    python scripts/pretrain_tiny.py --seed 1 --out ViT-Tiny-8.pt

Images: the ten digits, 52 letters and 8 shapes, in the fonts that matplotlib ships, bent, thinned,
coarsened, placed and coloured at random. Captions: "a photo of a seven.", "a drawing of a red
capital b.". Handwriting is never seen; the validation part of the digits (datasets/digits.py) is
only measured, with the prompt "a photo of a {}.". The state of the run is kept beside the
checkpoint, and the same command continues from it; a run that was interrupted ends with the same
weights as one that was not, on the same machine and number of threads.
"""

import argparse
import hashlib
import io
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from signs import CLASSNAMES, COLOURS, bend, coarsen, draw_signs, normalise, paint, place
from torch import Tensor

from clip import CLIP, build_model
from datasets import digits
from utils import atomic_write

SIZES = {
    "embed_dim": 64,
    "image_resolution": 32,
    "vision_layers": 4,
    "vision_width": 128,
    "vision_patch_size": 8,
    "context_length": 32,
    "vocab_size": 514,
    "transformer_width": 64,
    "transformer_layers": 2,
}

DIGIT_WEIGHT = 3.0  # how much more often a digit is drawn than another class
TEMPLATES = (
    *("a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "an image of a {}."),
    *("a drawing of a {}.", "a sketch of a {}.", "a print of a {}.", "a sign of a {}."),
    *("a {}.", "the {}."),
)
NAMED = 0.25  # share of the captions that name the colour

BATCH = 128
LEARNING_RATE, WARMUP, WEIGHT_DECAY, SCALE_FACTOR = 1.5e-3, 100, 0.05, 5.0
# Share of the steps in which the distortions grow to their full strength; in full from the start
# they leave the loss where it is for the first thousand steps.
RAMP = 0.3
EVERY = 250  # steps between two saved states


class Source:
    """Endless batches of images and captions.

    Attributes:
        captions: All captions there are, as token rows (M, 32).
    """

    def __init__(self, model: CLIP):
        self.distances, labels = draw_signs()
        self.first = torch.searchsorted(labels, torch.arange(len(CLASSNAMES)))
        self.count = torch.bincount(labels)
        self.weights = torch.ones(len(CLASSNAMES))
        self.weights[: len(digits.CLASSNAMES)] = DIGIT_WEIGHT
        colours = ["", *(f"{colour} " for colour in COLOURS)]
        self.captions = model.tokenize(
            [
                template.format(colour + name).replace("a orange", "an orange")
                for name in CLASSNAMES
                for colour in colours
                for template in TEMPLATES
            ]
        )

    def batch(self, hard: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw one batch.

        Args:
            hard: How much the images are distorted, from 0 to 1.
            generator: Source of all draws.

        Returns:
            Images (B, 3, 32, 32), the batch's different captions (U, L), and which of them are
            true of which image (B, U), bool.
        """
        classes = torch.multinomial(self.weights, BATCH, replacement=True, generator=generator)
        fonts = (torch.rand(BATCH, generator=generator) * self.count[classes]).long()
        ink = bend(self.distances[self.first[classes] + fonts], hard, generator)
        ink = place(coarsen(ink, hard, generator), hard, generator)
        colours = torch.randint(len(COLOURS), (BATCH,), generator=generator)
        images = paint(ink, colours, hard, generator)

        named = torch.rand(BATCH, generator=generator) < NAMED
        templates = torch.randint(len(TEMPLATES), (BATCH,), generator=generator)
        per_class = len(TEMPLATES) * (1 + len(COLOURS))
        said = torch.where(named, colours + 1, 0)  # zero says nothing
        captions = (classes * per_class + said * len(TEMPLATES) + templates).unique()  # (U,)
        of_class = captions // per_class
        of_colour = captions % per_class // len(TEMPLATES) - 1
        true = (of_class == classes[:, None]) & (
            (of_colour == -1) | (of_colour == colours[:, None])
        )  # (B, U)
        tokens = self.captions[captions]
        length = int(tokens.argmax(dim=1).max()) + 1  # nothing follows the end of a text
        return images, tokens[:, :length], true


def contrastive_loss(logits: Tensor, true: Tensor) -> Tensor:
    """CLIP's symmetric loss where an image has several true captions and a caption several images.

    Args:
        logits: Scaled similarities (B, U).
        true: Which captions are true of which images (B, U), at least one in each row and column.
    """
    loss = torch.zeros(())
    for scores, match in ((logits, true), (logits.T, true.T)):
        target = match / match.sum(dim=1, keepdim=True)
        loss = loss + F.cross_entropy(scores, target) / 2
    return loss


def validation_set() -> tuple[Tensor, Tensor]:
    """Images (359, 3, 32, 32) from 0 to 1 and labels of the digits' validation part."""
    images, labels = digits.render()
    chosen = digits.split_indices(labels)["val"]
    grey = torch.from_numpy(images[chosen]).float().div(255)
    return grey[:, None].expand(-1, 3, -1, -1), torch.from_numpy(labels[chosen])


@torch.no_grad()
def zero_shot_accuracy(model: CLIP, images: Tensor, labels: Tensor) -> float:
    """Percent of images of digits that are nearest to their own prompt."""
    tokens = model.tokenize([f"a photo of a {name}." for name in digits.CLASSNAMES])
    texts = F.normalize(model.encode_text(tokens), dim=-1)
    logits = model.encode_image(normalise(images)) @ texts.T
    return 100 * (logits.argmax(dim=1) == labels).double().mean().item()


def checkpoint_bytes(model: CLIP) -> bytes:
    """The file to ship: OpenAI's layout, fp16, readable with weights_only=True."""
    state = {key: value.half() for key, value in model.state_dict().items()}
    for key, name in (
        ("input_resolution", "image_resolution"),
        ("context_length", "context_length"),
        ("vocab_size", "vocab_size"),
    ):
        state[key] = torch.tensor(SIZES[name])
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / WARMUP)
    return LEARNING_RATE * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(out: Path, seed: int, steps: int, stop: int | None = None) -> CLIP:
    """Pre-train, or continue where a saved state says so, and write the checkpoint.

    Args:
        out: The checkpoint's path; the run's state lies beside it under `<name>.state`.
        seed: Of the weights and of all data.
        steps: Length of the schedule.
        stop: End after this step without a checkpoint, as an interrupted run would.

    Returns:
        The model, as trained (float32).

    Raises:
        ValueError: The saved state belongs to another seed or number of steps.
    """
    torch.manual_seed(seed)
    model = CLIP(**SIZES)
    source = Source(model)
    generator = torch.Generator().manual_seed(seed)
    others = [value for name, value in model.named_parameters() if name != "logit_scale"]
    groups = [{"params": others, "factor": 1.0}]
    groups += [{"params": [model.logit_scale], "factor": SCALE_FACTOR, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    images, labels = validation_set()

    state_path = out.with_name(f"{out.name}.state")
    first = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        if (state["seed"], state["steps"]) != (seed, steps):
            raise ValueError(
                f"{state_path} belongs to seed {state['seed']} and {state['steps']} steps: "
                "remove it, or name another --out"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        first = state["step"]
        print(f"continuing {state_path} after step {first}", flush=True)

    start, total = time.perf_counter(), 0.0
    for step in range(first, steps if stop is None else min(stop, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps) * group["factor"]
        batch, tokens, true = source.batch(min(1.0, step / (RAMP * steps)), generator)
        image_features = F.normalize(model.encode_image(normalise(batch)), dim=-1)
        text_features = F.normalize(model.encode_text(tokens), dim=-1)
        logits = model.logit_scale.exp() * image_features @ text_features.T  # (B, U)
        loss = contrastive_loss(logits, true)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        done = step + 1
        if done % EVERY == 0 or done in (steps, stop):
            count = (done - first - 1) % EVERY + 1
            rate = (done - first) / (time.perf_counter() - start)
            print(
                f"step {done}/{steps}, loss {total / count:.3f}, scale "
                f"{model.logit_scale.exp().item():.1f}, {rate:.1f} steps/s, validation zero-shot "
                f"{zero_shot_accuracy(model, images, labels):.2f} %",
                flush=True,
            )
            total = 0.0
            state = {"seed": seed, "steps": steps, "step": done, "model": model.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "generator": generator.get_state()}
            buffer = io.BytesIO()
            torch.save(state, buffer)
            atomic_write(state_path, buffer.getvalue())
    if stop is not None and stop < steps:
        return model

    data = checkpoint_bytes(model)
    atomic_write(out, data)
    state_path.unlink(missing_ok=True)
    shipped = build_model(torch.load(io.BytesIO(data), weights_only=True))
    print(f"{out}: {len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
    print(f"validation zero-shot of the file: {zero_shot_accuracy(shipped, images, labels):.2f} %")
    return model


def main() -> None:
    """Read the flags and train."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="of the weights and of all data")
    parser.add_argument("--steps", type=int, default=3000, help="batches of 128")
    parser.add_argument("--out", type=Path, default=Path("ViT-Tiny-8.pt"), help="checkpoint")
    parser.add_argument("--threads", type=int, default=1, help="no more than there are free cores")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.out, args.seed, args.steps)


if __name__ == "__main__":
    main()
