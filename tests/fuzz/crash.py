"""Kill a run again and again, go on each time, and compare its end with an unbroken run's.

    python tests/fuzz/crash.py --kills 30
    python tests/fuzz/crash.py --method lora -- --precision bf16 --final_model best_val --eval_every 7

SIGKILL comes at a random moment, or while checkpoint.pt, weights.safetensors, curve.csv or
result.json is being written. Weights, curve and accuracies must be equal bit for bit. What follows
`--` goes to main.py.
"""  # noqa: E501

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from commands import outcome  # noqa: E402

DURING = ("checkpoint.pt", "curve.csv", "weights.safetensors", "result.json")


def command(out: Path, extra: Sequence[str]) -> list[str]:
    """A short run of main.py into a folder, resumed where there is something to resume."""
    return [
        sys.executable, str(ROOT / "main.py"), "--resume", "--save_path", str(out),
        "--save_weights", "--shots", "2", "--n_iters", "20", "--checkpoint_every", "3", *extra,
    ]  # fmt: skip


def run_folder(out: Path) -> Path | None:
    """The folder of the one run below `out`, once it is there."""
    return next((path.parent for path in out.rglob("config.yaml")), None)


def kill(out: Path, extra: Sequence[str], when: float | str) -> bool:
    """Start or resume the run, and kill it.

    Args:
        out: Folder of its results.
        extra: Arguments of main.py.
        when: Seconds after the start, or the file during whose writing it is to die.

    Returns:
        Whether it was killed; otherwise it had finished before.

    Raises:
        RuntimeError: It ended with an error.
    """
    process = subprocess.Popen(
        command(out, extra), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    start = time.monotonic()
    while process.poll() is None:
        folder = run_folder(out) if isinstance(when, str) else None
        # Once it is there its content is on its way to the disk, for a millisecond or so.
        if folder and any(folder.glob(f".{when}.{process.pid}.tmp")):
            break
        if isinstance(when, float):
            time.sleep(0.002)
            if time.monotonic() - start > when:
                break
    process.kill()
    text = process.communicate()[0]
    if process.returncode not in (0, -9):
        raise RuntimeError(f"status {process.returncode} after a kill ({when}): {text}")
    return process.returncode == -9


def trial(kills: int, seed: int, extra: Sequence[str], scratch: Path) -> Counter:
    """Run once unbroken; then kill, as often as asked, over as many runs as that takes.

    Returns:
        How many kills there were at which moment.

    Raises:
        AssertionError: A resumed run ended otherwise than the unbroken one.
        RuntimeError: A run ended with an error.
    """
    draw = random.Random(seed)
    start = time.monotonic()
    subprocess.run(
        command(scratch / "whole", extra), cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    seconds = time.monotonic() - start
    expected = outcome(scratch / "whole")
    moments: Counter = Counter()
    while moments.total() < kills:
        out = scratch / "broken"
        alive = True
        while alive and moments.total() < kills:
            when = draw.choice([*DURING, *([draw.uniform(0.3, 1) * seconds] * len(DURING))])
            alive = kill(out, extra, when)
            if alive:
                moments["at random" if isinstance(when, float) else f"writing {when}"] += 1
        subprocess.run(command(out, extra), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        for key, value in outcome(out).items():
            assert value == expected[key], f"{key} differs after {dict(moments)}, seed {seed}"
        shutil.rmtree(out)
    return moments


def main() -> None:
    """Read the flags, kill, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--method", default="so", help="so, lora or adam")
    parser.add_argument("extra", nargs="*", help="arguments of main.py, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        extra = ["--method", args.method, *args.extra]
        moments = trial(args.kills, args.seed, extra, Path(scratch))
    how = ", ".join(f"{count} {moment}" for moment, count in sorted(moments.items()))
    print(f"{' '.join(extra)}: {moments.total()} kills ({how}); every end equal bit for bit")


if __name__ == "__main__":
    main()
