"""Kill a run again and again, resume it each time, and compare its end with an unbroken run's.

    python tests/fuzz/crash.py --kills 30
    python tests/fuzz/crash.py -- --method lora --precision bf16 --final_model best_val

SIGKILL comes at a random moment, or while checkpoint.pt, weights.safetensors, curve.csv or
result.json is being written. Weights, curve, predictions and accuracies must be equal bit for bit.
What follows `--` goes to main.py.
"""

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

MID_WRITE = ("checkpoint.pt", "curve.csv", "weights.safetensors", "result.json")


def command(out: Path, flags: Sequence[str]) -> list[str]:
    """A short run of main.py into a folder, resumed if it has begun."""
    return [
        sys.executable, str(ROOT / "main.py"), "--resume", "--save_path", str(out),
        "--save_weights", "--shots", "2", "--n_iters", "20", "--checkpoint_every", "3", *flags,
    ]  # fmt: skip


def finish_run(out: Path, flags: Sequence[str]) -> None:
    """Start or resume the run and wait for its end."""
    subprocess.run(command(out, flags), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def kill_run(out: Path, flags: Sequence[str], when: float | str) -> bool:
    """Start or resume the run, and kill it.

    Args:
        out: Folder of its results.
        flags: Arguments of main.py.
        when: Seconds after the start, or the name of a file that is being written.

    Returns:
        Whether it was killed; if not, it had finished.

    Raises:
        RuntimeError: The run ended with an error.
    """
    process = subprocess.Popen(
        command(out, flags), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    start = time.monotonic()
    while process.poll() is None:
        if isinstance(when, float):
            time.sleep(0.002)
            if time.monotonic() - start > when:
                break
        elif any(out.rglob(f".{when}.{process.pid}.tmp")):  # it is there for a millisecond or so
            break
    process.kill()
    text = process.communicate()[0]
    if process.returncode not in (0, -9):
        raise RuntimeError(f"status {process.returncode} after a kill ({when}): {text}")
    return process.returncode == -9


def crash_test(kills: int, seed: int, flags: Sequence[str], scratch: Path) -> Counter[str]:
    """Make the run once without a kill, then with `kills` of them, several runs if need be.

    Returns:
        The number of kills at random, and while each file was being written.

    Raises:
        AssertionError: A resumed run differs from the unbroken one.
        RuntimeError: A run ended with an error.
    """
    rng, moments = random.Random(seed), Counter()
    start = time.monotonic()
    finish_run(scratch / "unbroken", flags)
    seconds = time.monotonic() - start
    expected = outcome(scratch / "unbroken")
    while moments.total() < kills:
        out, alive = scratch / "killed", True
        while alive and moments.total() < kills:
            at_random = rng.uniform(0.3, 1) * seconds
            when = rng.choice([at_random] * len(MID_WRITE) + [*MID_WRITE])
            alive = kill_run(out, flags, when)
            moments["at random" if isinstance(when, float) else f"writing {when}"] += alive
        finish_run(out, flags)
        for key, value in outcome(out).items():
            assert value == expected[key], f"{key} differs after {dict(moments)}, seed {seed}"
        shutil.rmtree(out)
    return moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of their moments")
    parser.add_argument("flags", nargs="*", help="arguments of main.py, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        moments = crash_test(args.kills, args.seed, args.flags, Path(scratch))
    counts = ", ".join(f"{count} {moment}" for moment, count in sorted(moments.items()))
    print(f"{' '.join(args.flags)}: {moments.total()} kills ({counts}); all ends are equal")


if __name__ == "__main__":
    main()
