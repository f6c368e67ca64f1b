"""A whole run in miniature, as main.py does it: seconds of its stages, and of waiting for images.

    python benchmarks/run.py [--backbone ViT-B/16] [--shots 1] [--n_iters 50] [--json FILE]

Rows: main.py as it is, with --dense_grad, and with --precision bf16; each is a process of its own,
one after the other. Weights are random, in a checkpoint of OpenAI's layout; images are generated
in EuroSAT's layout. Tokens are made up, for real ones need the tokenizer's merges file.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

START = time.perf_counter()  # of the process, but for the interpreter's own

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import job  # noqa: E402
import main as so  # noqa: E402
from benchmarks.common import (  # noqa: E402
    BACKBONES,
    cut,
    machine,
    peak_mb,
    print_table,
    random_state_dict,
    random_tokens,
    write_json,
)
from runs.environment import get_default_device, set_up_device  # noqa: E402

ROWS = {
    "SO": [],
    "SO, --dense_grad": ["--dense_grad"],
    "SO, --precision bf16": ["--precision", "bf16"],
}
STAGES = ("start-up", "zero-shot", "training", "final")


def work(row: str, args: argparse.Namespace) -> None:
    """Run main.py with a clock at its functions, and print seconds as JSON."""
    seconds: dict[str, float] = {"waiting": 0.0}
    evaluate, train = job.evaluate, so.train

    def timed(stage: str, function: Callable, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        seconds.setdefault("start-up", start - START)
        result = function(*arguments, **options)  # both wait for the device before they return
        seconds[stage] = time.perf_counter() - start
        if stage == "training":
            seconds[stage] -= seconds["final"]  # the last evaluation is a part of it
        return result

    def waited_for(batches: Iterator) -> Iterator:
        while True:
            start = time.perf_counter()
            batch = next(batches)
            seconds["waiting"] += time.perf_counter() - start
            yield batch

    job.evaluate = lambda *rest, **options: timed(
        "final" if "zero-shot" in seconds else "zero-shot", evaluate, *rest, **options
    )
    so.train = lambda adapted, batches, *rest, **options: timed(
        "training", train, adapted, waited_for(batches), *rest, **options
    )
    job.tokenize_prompts = lambda model, classnames, template: cut(
        random_tokens(len(classnames), model.vocab_size, model.context_length)
    ).to(model.text_projection.device)

    folder = Path(args.folder)
    flags = {
        "root_path": folder, "dataset": "eurosat", "backbone": folder / "clip.pt",
        "save_path": folder / row, "shots": args.shots, "n_iters": args.n_iters,
        "batch_size": args.batch, "early_stop_loss": 0, "device": args.device,
        "threads": args.threads, "num_workers": args.num_workers, "cache_mb": args.cache_mb,
    }  # fmt: skip
    argv = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    with redirect_stdout(io.StringIO()):  # accuracies of random weights
        so.main(argv + ROWS[row])
    memory = peak_mb(torch.device(args.device))
    print(json.dumps({"row": row, "seconds": seconds, "peak_mb": memory}))


def prepare(args: argparse.Namespace) -> None:
    """Write the checkpoint, and images of noise with a split file, as EuroSAT has them."""
    torch.save(random_state_dict(BACKBONES[args.backbone]), Path(args.folder) / "clip.pt")
    folder, noise = Path(args.folder) / "eurosat", np.random.default_rng(0)
    parts: dict[str, list] = {"train": [], "val": [], "test": []}
    for label in range(args.classes):
        (folder / "2750" / f"z{label}").mkdir(parents=True)
        for i in range(args.images):
            name = f"z{label}/{i}.jpg"
            pixels = noise.integers(256, size=(args.side, args.side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "2750" / name)
            part = "train" if 2 * i < args.images else "val" if i % 5 < 2 else "test"
            parts[part].append((name, label, f"class {label}"))
    (folder / "split_zhou_EuroSAT.json").write_text(json.dumps(parts))


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    add("--backbone", choices=list(BACKBONES), default="ViT-B/16")
    add("--classes", type=int, default=10)
    add("--shots", type=int, default=1)
    add("--n_iters", type=int, default=50, help="iterations per shot")
    add("--batch", type=int, default=32, help="images of an iteration")
    add("--images", type=int, default=40, help="per class: half to train, 30 % to test")
    add("--side", type=int, default=64, help="of the images, in pixels; EuroSAT's is 64")
    add("--num_workers", type=int, help="as main.py's, and so are the next two")
    add("--cache_mb", type=int)
    add("--threads", type=int)
    add("--device", default=get_default_device())
    add("--json", help="write the figures to this file, too")
    add("--folder", help=argparse.SUPPRESS)
    add("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.worker:
        return work(args.worker, args)
    about = machine(set_up_device(args.device, args.threads, seed=0))
    with tempfile.TemporaryDirectory() as args.folder:
        prepare(args)
        rows = []
        for row in args.rows:
            extra = ["--worker", row, "--folder", args.folder]
            command = [sys.executable, __file__, *sys.argv[1:], *extra]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append(json.loads(output))
    for row in rows:
        row["waiting_share"] = row["seconds"]["waiting"] / row["seconds"]["training"]
    print(
        f"{args.backbone}, {args.classes} classes, images per class: {args.shots}, "
        f"{args.n_iters * args.shots} iterations, batches of {args.batch}, images of {args.side} "
        f"pixels; {about['device']}, {about['threads']} threads, torch {about['torch']}\n"
    )
    columns: dict[str, Callable[[dict], str]] = {
        "": lambda row: row["row"],
        **{
            f"{stage}, s": lambda row, stage=stage: f"{row['seconds'][stage]:.2f}"
            for stage in STAGES
        },
        "waiting for images, s": lambda row: f"{row['seconds']['waiting']:.2f}",
        "of training, %": lambda row: f"{100 * row['waiting_share']:.1f}",
        "peak, MB": lambda row: f"{row['peak_mb']:.0f}",
    }
    print_table(columns, rows)
    write_json(args, machine=about, rows=rows)


if __name__ == "__main__":
    main()
