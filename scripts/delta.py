"""Inspect weights.safetensors, scale it, apply it to its base, or restore the base.

    python scripts/delta.py inspect weights.safetensors
    python scripts/delta.py apply weights.safetensors --out full.pt           # for clip.load
    python scripts/delta.py scale weights.safetensors 0.5 --out half.safetensors
    python scripts/delta.py revert full.pt weights.safetensors --out base.pt

The base is the backbone that the delta names; --base gives another path to it. Full weights are a
state dict, written as safetensors if --out ends in .safetensors, else by torch.save. Their trained
weights are float32, also if the base is an fp16 checkpoint; all others keep their dtype.
"""

import argparse
import io
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path

from reporting.markdown import markdown
from torch import Tensor

import clip
from clip import CLIP
from optimizers.delta import (
    apply_delta,
    interpolate_weights_,
    read_delta,
    save_delta,
    state_dict_sha256,
)
from run_utils import OneLineErrorParser, backbone_arg, bounded_number
from runs.cli import run_cli
from runs.weights import resolve_base, save_state_dict

FILE_METADATA = ("format", "version", "base_digest", "shapes")  # that save_delta adds itself
COLUMNS = ("matrix", "shape", "entries", "share, %", "bytes", "bytes of all")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = vars(parse_args(argv))
    command = args.pop("function")
    return run_cli(lambda: print(command(**args)), "delta.py")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the function of the subcommand as `function`, and its arguments."""
    parser = OneLineErrorParser(prog="delta.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, function: Callable[..., str], files: Sequence[str], out: str, help: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(function=function)
        for file in files:
            command.add_argument(file, type=Path, metavar=file.upper())
        if out:
            command.add_argument("--out", type=Path, required=True, metavar=out, help="to write")
            command.add_argument(
                "--base", type=backbone_arg, help="name or path of the base (the backbone in FILE)"
            )
        return command

    add("inspect", inspect, ["file"], "", "show what a delta changes")
    add("apply", apply, ["file"], "FULL", "write the trained weights")
    add("scale", scale, ["file"], "SCALED", "scale what a delta changes").add_argument(
        "alpha",
        type=bounded_number(float, 0),
        metavar="ALPHA",
        help="factor: 0 is the base, 1 is FILE",
    )
    add("revert", restore_base, ["full", "file"], "BASE", "write the base of full weights")
    return parser.parse_args(argv)


def inspect(file: Path) -> str:
    """Return a table of a delta's tensors and their sum, and its metadata."""
    delta = read_delta(file)
    rows, totals = [], [0, 0, 0, 0]
    for name, (indices, values, shape) in delta.tensors.items():
        entries, nbytes = math.prod(shape), indices.nbytes + values.nbytes
        sizes = [len(indices), entries, nbytes, entries * values.element_size()]
        totals = [total + size for total, size in zip(totals, sizes, strict=True)]
        rows.append(_row(name, " x ".join(map(str, shape)), *sizes))
    rows.append(_row(f"all {len(rows)}", "", *totals))
    metadata = [f"{key}: {text}" for key, text in sorted(delta.metadata.items()) if key != "shapes"]
    lines = [f"file: {file.stat().st_size:,} bytes", *metadata]
    lines = [line if line.isprintable() else ascii(line) for line in lines]
    return "\n".join([markdown(COLUMNS, rows, left=2), "", *lines])


def _row(
    name: str, shape: str, changed: int, entries: int, nbytes: int, full_nbytes: int
) -> list[str]:
    """The cells of a row, in the order of COLUMNS."""
    share = 100 * changed / max(entries, 1)
    return [name, shape, f"{changed:,}", f"{share:.4f}", f"{nbytes:,}", f"{full_nbytes:,}"]


def apply(file: Path, out: Path, base: str | None) -> str:
    """Write the trained weights as a full checkpoint."""
    delta = read_delta(file)
    base_path = resolve_base(delta, base)
    validate_output(out, file, base_path)
    state, model = read_clip(base_path)
    apply_delta(model, delta)
    trained = {name: model.get_parameter(name) for name in delta.tensors}
    save_state_dict(out, state | trained)
    entries = sum(len(change.indices) for change in delta.tensors.values())
    return f"{out}: {base_path} with {entries:,} entries of {len(delta.tensors)} matrices changed"


def scale(file: Path, alpha: float, out: Path, base: str | None) -> str:
    """Write a delta whose values are base + alpha (value - base)."""
    delta = read_delta(file)
    validate_output(out, file, resolve_base(delta, base))
    with redirect_stderr(io.StringIO()):  # notes on activation and heads, which scaling leaves
        model, _ = clip.load(base or delta.metadata["backbone"], "cpu")
    trained = {name: model.get_parameter(name).detach() for name in delta.tensors}
    before = {name: weight.clone() for name, weight in trained.items()}
    apply_delta(model, delta)
    interpolate_weights_(trained, before, alpha)
    metadata = {key: text for key, text in delta.metadata.items() if key not in FILE_METADATA}
    metadata["wise"] = f"{float(metadata.get('wise', 1)) * alpha:g}"
    save_delta(out, trained, before, delta.metadata["base_digest"], **metadata)
    return f"{out}: {file}, scaled by {alpha:g}"


def restore_base(full: Path, file: Path, out: Path, base: str | None) -> str:
    """Write the base again, if the full weights are the base with the delta applied."""
    delta = read_delta(file)
    base_path = resolve_base(delta, base)
    validate_output(out, full, file, base_path)
    state, model = read_clip(base_path)
    apply_delta(model, delta)
    if state_dict_sha256(model) != state_dict_sha256(read_clip(full)[1]):
        raise ValueError(
            f"{full} is not what {file} makes of {base_path}: name the full weights that `apply` "
            "wrote"
        )
    save_state_dict(out, state)
    return f"{out}: {base_path}, without {file}"


def validate_output(out: Path, *inputs: Path) -> None:
    """Raise a ValueError if `out` cannot be written, or is one of the inputs."""
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out {out} is not a file name in an existing folder")
    if any(out.exists() and path.exists() and out.samefile(path) for path in inputs):
        raise ValueError(f"--out {out} would replace what it is made from: give another name")


def read_clip(path: Path) -> tuple[dict[str, Tensor], CLIP]:
    """Return the state dict of a checkpoint as it is, and its model in float32."""
    try:
        state = clip.read_checkpoint(path)
        return state, clip.build_model(state)
    except ValueError as error:
        reason = str(error).removeprefix(f"{path} cannot be used: ")
        raise ValueError(
            f"{path} cannot be used here ({reason}); for CLIPs that open_clip builds, "
            "scripts/export.py RUN --to open_clip writes full weights"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
