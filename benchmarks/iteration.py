"""Milliseconds and peak memory of one training iteration, side by side.

    python benchmarks/iteration.py [--classes 10] [--batch 32] [--backbone ViT-B/16] [--threads 2]

Rows: `plain`, SO as the authors compute it (plain.py); `short`, `last` and `sampled`, the same with
one of our savings: short texts, one token in the last block, sparse weight gradients; `lora`, rank
2 on q, k and v of both towers; `adam`, torch's on SO's matrices; `so`, what main.py does. `so:bf16`
is `so` in bf16. Rows take turns, each in a process of its own: a warm-up, then T = 5 iterations, of
which one draws supports. Medians of the turns are printed. Weights, images and prompts are random.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import plain
from benchmarks.common import (
    BACKBONES,
    T,
    describe_machine,
    peak_mb,
    print_table,
    random_tokens,
    run_in_process,
    synchronize,
    trim_padding,
)
from clip import CLIP
from clip.preprocess import normalize
from clip.zero_shot import ZeroShotClassifier
from optimizers.build import build_optimizer, mark_as_trainable
from runs.environment import get_default_device, set_up_device
from train import TrainConfig, TrainState, train_step
from utils import Progress

METHODS = {
    "plain": "SO, as the authors compute it",
    "short": "the same with short texts",
    "last": "the same with one token in the last block",
    "sampled": "the same with sparse gradients",
    "lora": "LoRA",
    "adam": "Adam",
    "so": "SO",
}
ROWS = [*METHODS, *(f"{name}:{p}" for name in ("lora", "adam", "so") for p in ("bf16", "fp16"))]
LR, RANK = 2e-4, 2
MAX_ITERATIONS = 10**6  # of a training, of which a row is the start


def prepare(
    name: str, args: argparse.Namespace, device: torch.device
) -> tuple[CLIP, Callable[[], object]]:
    """A row's model, and the function that does one iteration."""
    method, _, precision = name.partition(":")
    widths = dict(vision_width=args.width, transformer_width=args.width) if args.width else {}
    model = CLIP(**BACKBONES[args.backbone] | widths).eval().to(device)
    kind = method if method in ("lora", "adam") else "so"
    weights = mark_as_trainable(model, "both", "all", kind)
    tokens = random_tokens(args.classes, model.vocab_size, model.context_length).to(device)
    side = model.visual.input_resolution
    images = torch.randint(256, (args.batch, side, side, 3), dtype=torch.uint8)
    batch = images.permute(0, 3, 1, 2), torch.randint(args.classes, (args.batch,))
    if method in ("plain", "short", "last"):
        optimizer = plain.PlainSO(list(weights.values()), args.density, LR, T)
    else:
        settings = dict(lr=LR, density=args.density, T=T, rank=RANK, seed=0)
        optimizer = build_optimizer(kind, model, weights, **settings)
    if method == kind:
        classifier = ZeroShotClassifier(
            model, trim_padding(tokens)[None],
            precision=precision or "fp32", class_batch_size=args.class_batch_size,
        )  # fmt: skip
        state, config = TrainState(MAX_ITERATIONS, device, classifier.precision), TrainConfig(LR)
        with classifier.autocast:
            classifier.precompute_frozen_text()
        return model, lambda: train_step(classifier, optimizer, batch, state, config)
    tokens = trim_padding(tokens) if method == "short" else tokens
    return model, lambda: plain_step(model, optimizer, batch, tokens, method == "last")


def plain_step(
    model: CLIP,
    optimizer: "plain.PlainSO | torch.optim.Optimizer",
    batch: tuple[Tensor, Tensor],
    tokens: Tensor,
    one_token: bool,
) -> None:
    """An iteration as in the authors' code, or with `one_token` in the last blocks."""
    images, labels = (tensor.to(tokens.device) for tensor in batch)
    images = normalize(images, model.image_mean, model.image_std)
    text_features = plain.encode_text(model, tokens, one_token)
    image_features = plain.encode_image(model, images, one_token)
    model.zero_grad()
    plain.cosine_loss(image_features, text_features, labels).backward()
    optimizer.step()


def take_turn(name: str, args: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds of a row's iteration, the mean of T, and its peak memory in MB."""
    device = set_up_device(args.device, args.threads)
    torch.manual_seed(0)
    _, iterate = prepare(name, args, device)
    iterate()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(T):
        iterate()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start) / T, peak_mb(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    usual = ["plain", "lora", "adam", "so", "so:bf16"]
    add("--rows", nargs="+", choices=ROWS, default=usual, metavar="ROW", help=", ".join(ROWS))
    add("--backbone", choices=list(BACKBONES), default="ViT-B/16")
    add("--width", type=int, help="channels of both towers, a multiple of 64; the backbone's")
    add("--classes", type=int, default=10)
    add("--batch", type=int, default=32, help="number of images")
    add("--density", type=float, default=5e-5)
    add("--class_batch_size", type=int, default=0, help="as main.py's")
    add("--turns", type=int, default=2, help="turns of each row")
    add("--threads", type=int, help="torch's threads on the CPU")
    add("--device", default=get_default_device())
    args = parser.parse_args()
    turns = {name: [] for name in args.rows}
    for name in Progress(args.turns * args.rows, desc="Iterations", unit="turn"):
        turns[name].append(run_in_process(take_turn, name, args))
    print(
        f"{args.backbone}, width {args.width or 'its own'}, {args.classes} classes, "
        f"batches of {args.batch}, both encoders, all layers, density {args.density:g}; "
        f"{describe_machine(set_up_device(args.device, args.threads))}\n"
    )
    rows, first = [], None
    for name, measured in turns.items():
        method, _, precision = name.partition(":")
        ms, peak = (median(values) for values in zip(*measured, strict=True))
        first = first or (ms, peak)
        rows.append({
            "": METHODS[method] + (precision and f", {precision}"),
            "ms": f"{ms:.1f}",
            "times as fast": f"{first[0] / ms:.2f}",
            "peak, MB": f"{peak:.0f}",
            "of the first": f"{peak / first[1]:.2f}",
        })  # fmt: skip
    print_table(rows)


if __name__ == "__main__":
    main()
