"""Milliseconds and peak memory of one training iteration, side by side.

    python benchmarks/iteration.py [--classes 10] [--batch 32] [--backbone ViT-B/16] [--threads 2]

Rows are those of METHODS; `so:bf16` is `so` in bf16. LoRA has rank 2, on q, k and v of both towers;
LoRA, Adam and SO have main.py's shortcuts. Rows take turns, each in a process of its own: two
iterations to warm up, then T = 5, of which one draws supports. Medians of the turns are printed.
Weights, images and prompts are random.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import plain
from benchmarks.common import BACKBONES, T, print_table, random_tokens, run_in_process
from clip import CLIP
from clip.preprocess import normalize
from clip.zero_shot import ZeroShotClassifier
from optimizers.build import build_optimizer, mark_as_trainable
from runs.environment import get_default_device, peak_memory_mb, set_up_device
from train import TrainConfig, TrainState, train_step
from utils import Progress

METHODS = {
    "plain": "SO, as the authors compute it",
    "short": "the same with short texts",
    "sampled": "the same with sparse gradients",
    "lora": "LoRA",
    "adam": "Adam",
    "so": "SO",
}
LR = 2e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    usual = ["plain", "lora", "adam", "so", "so:bf16"]
    add("--rows", nargs="+", default=usual, metavar="ROW[:PRECISION]", help=", ".join(METHODS))
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
    medians = {name: [median(x) for x in zip(*turn, strict=True)] for name, turn in turns.items()}
    first_ms, first_mb = medians[args.rows[0]]
    rows = []
    for name, (ms, mb) in medians.items():
        method, _, precision = name.partition(":")
        rows.append({
            "": METHODS[method] + (precision and f", {precision}"),
            "ms": f"{ms:.1f}",
            "times as fast": f"{first_ms / ms:.2f}",
            "peak, MB": f"{mb:.0f}",
            "of the first": f"{mb / first_mb:.2f}",
        })  # fmt: skip
    print_table(rows)


def take_turn(name: str, args: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds of a row's iteration, the mean of T, and its peak memory in MB."""
    device = set_up_device(args.device, args.threads)
    torch.manual_seed(0)
    _, iterate = prepare(name, args, device)
    timer = Timer("step()", globals={"step": iterate}, num_threads=torch.get_num_threads())
    return 1e3 * timer.timeit(T).mean, peak_memory_mb(device)


def prepare(
    name: str, args: argparse.Namespace, device: torch.device
) -> tuple[CLIP, Callable[[], object]]:
    """A row's model, and the function that does one iteration."""
    method, _, precision = name.partition(":")
    widths = dict(vision_width=args.width, transformer_width=args.width) if args.width else {}
    model = CLIP(**BACKBONES[args.backbone] | widths).eval().to(device)
    kind = method if method in ("lora", "adam") else "so"
    weights = mark_as_trainable(model, "both", "all", kind)
    tokens = random_tokens(args.classes, model.vocab_size).to(device)
    if method not in ("plain", "sampled"):
        tokens = tokens[:, : int(tokens.argmax(dim=-1).max()) + 1]  # as main.py has them
    side = model.visual.input_resolution
    images = torch.randint(256, (args.batch, 3, side, side), dtype=torch.uint8)
    batch = images, torch.randint(args.classes, (args.batch,))
    if method in ("plain", "short"):
        optimizer = plain.PlainSO(list(weights.values()), args.density, LR)
    else:
        settings = dict(lr=LR, density=args.density, T=T, rank=2, seed=0)
        optimizer = build_optimizer(kind, model, weights, **settings)

    def plain_step() -> None:
        images, labels = (tensor.to(device) for tensor in batch)
        image_features = plain.encode_image(model, normalize(images))
        model.zero_grad()
        plain.cosine_loss(image_features, plain.encode_text(model, tokens), labels).backward()
        optimizer.step()

    if method != kind:
        return model, plain_step
    classifier = ZeroShotClassifier(
        model, tokens[None],
        precision=precision or "fp32", class_batch_size=args.class_batch_size,
    )  # fmt: skip
    state, config = TrainState(10**6, device, classifier.precision), TrainConfig(LR)
    with classifier.autocast:
        classifier.precompute_frozen_text()
    return model, lambda: train_step(classifier, optimizer, batch, state, config)


if __name__ == "__main__":
    main()
