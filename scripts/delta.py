"""Look into weights.safetensors, scale it, make full weights of it, take it out of them again.

    python scripts/delta.py inspect weights.safetensors
    python scripts/delta.py apply weights.safetensors --out full.pt           # for clip.load
    python scripts/delta.py scale weights.safetensors 0.5 --out half.safetensors
    python scripts/delta.py revert full.pt weights.safetensors --out base.pt

The base is the backbone that the delta names; --base names another place to find it. Full weights
keep the base's tensors as they are, but for the trained matrices, which are in the wider of both
precisions: float32, where an fp16 checkpoint was adapted. They are a state dict, in the safetensors
format if the name of --out ends so, else written by torch.save.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors.torch
import torch
from reporting.markdown import markdown
from torch import Tensor

from clip import CLIP, build_model, read_checkpoint
from clip.loading import resolve_checkpoint
from optimizers.delta import (
    Delta,
    apply_delta,
    changed_indices,
    interpolate_weights_,
    read_delta,
    save_delta,
)  # fmt: skip
from run_utils import OneLineErrorParser, backbone, bounded_number
from utils import atomic_write, format_error, one_line, print_quietly

OWN_METADATA = ("format", "version", "base_digest", "shapes")  # that each file has of itself
HEADINGS = ("matrix", "shape", "entries", "share, %", "bytes", "bytes of all")


def inspect(file: Path) -> str:
    """Describe a delta: a line for each matrix, the sum, what it belongs to."""
    delta = read_delta(file)
    rows, sums = [], [0, 0, 0, 0]
    for name, (indices, values, shape) in delta.tensors.items():
        whole = math.prod(shape)
        size = indices.nbytes + values.nbytes
        sizes = [len(indices), whole, size, whole * values.element_size()]
        sums = [total + n for total, n in zip(sums, sizes, strict=True)]
        rows.append(_row(name, " x ".join(map(str, shape)), *sizes))
    rows.append(_row(f"all {len(rows)}", "", *sums))
    told = [f"{key}: {value}" for key, value in sorted(delta.metadata.items()) if key != "shapes"]
    told = [line if line.isprintable() else ascii(line) for line in told]
    return "\n".join(
        [markdown(HEADINGS, rows, left=2), "", f"file: {file.stat().st_size:,} bytes", *told]
    )


def _row(name: str, shape: str, changed: int, entries: int, size: int, whole: int) -> list[str]:
    """One line's cells, in the order of HEADINGS."""
    share = 100 * changed / max(entries, 1)
    return [name, shape, f"{changed:,}", f"{share:.4f}", f"{size:,}", f"{whole:,}"]


def apply(file: Path, out: Path, base: str | None) -> str:
    """Write the trained weights as a whole checkpoint."""
    delta = read_delta(file)
    place = find_base(delta, base)
    check_out(out, file, place)
    state, model = trained(delta, place)
    weights = model.state_dict()
    for name, change in delta.tensors.items():
        dtype = torch.promote_types(state[name].dtype, change.values.dtype)
        state[name] = weights[name].to(dtype)
    write(out, state)
    entries = sum(len(change.indices) for change in delta.tensors.values())
    return (
        f"{out}: {place} with {entries:,} entries of {len(delta.tensors)} matrices changed\n"
        f"To measure it: {evaluation(file, out)}"
    )


def evaluation(file: Path, weights: Path) -> str:
    """The command that measures whole weights on the task that a delta was trained for.

    The task stands in the run's config.yaml; where the delta no longer lies beside it, the user
    has to name the task.
    """
    config = file.parent / "config.yaml"
    task = ["--root_path", "DATA", "--dataset", "NAME"]
    if config.is_file():
        task = ["--config", str(config)]
    # No training leaves the "zero-shot" accuracy of these weights.
    return shlex.join(["python", "main.py", *task, "--backbone", str(weights), "--n_iters", "0"])


def revert(full: Path, file: Path, out: Path, base: str | None) -> str:
    """Write the base again, if full weights are what a delta makes of it, and nothing else."""
    delta = read_delta(file)
    place = find_base(delta, base)
    check_out(out, full, file, place)
    state, model = trained(delta, place)
    expected, found = model.state_dict(), read_clip(full)[1].state_dict()
    differing = sorted(expected.keys() ^ found.keys()) or [
        name
        for name, tensor in expected.items()
        if tensor.shape != found[name].shape or len(changed_indices(tensor, found[name]))
    ]
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise ValueError(
            f"{full} is not what {file} makes of {place}: it differs in {differing[0]}{more}; "
            "name the full weights that `apply` wrote"
        )
    write(out, state)
    return f"{out}: {place}, without {file}"


def scale(file: Path, alpha: float, out: Path, base: str | None) -> str:
    """Write a delta of which each value is base + alpha (value - base)."""
    delta = read_delta(file)
    place = find_base(delta, base)
    check_out(out, file, place)
    model = read_clip(place)[1]
    matrices = {name: model.state_dict()[name] for name in delta.tensors}
    before = {name: matrix.clone() for name, matrix in matrices.items()}
    apply_delta(model, delta)
    interpolate_weights_(matrices, before, alpha)
    told = {key: text for key, text in delta.metadata.items() if key not in OWN_METADATA}
    told["wise"] = f"{float(told.get('wise', 1)) * alpha:g}"
    save_delta(out, matrices, before, delta.metadata["base_digest"], **told)
    return f"{out}: {file}, scaled by {alpha:g}"


def find_base(delta: Delta, base: str | None) -> Path:
    """The file of the weights that a delta belongs to, or of those named instead.

    Raises:
        ValueError: Neither says where they are, or they are not there.
    """
    name = base or delta.metadata.get("backbone")
    if not name:
        raise ValueError(f"{delta.path} names no backbone: name its base with --base")
    try:
        return resolve_checkpoint(backbone(name), None)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"the base of {delta.path} is not here ({error}): give --base") from None


def check_out(out: Path, *inputs: Path) -> None:
    """Refuse, before the work, to write where that cannot be, or over what is read."""
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out {out} is not a file's name in a folder that is there")
    if any(out.exists() and path.exists() and out.samefile(path) for path in inputs):
        raise ValueError(f"--out {out} would replace what it is made from: give another name")


def read_clip(path: Path) -> tuple[dict[str, Tensor], CLIP]:
    """A checkpoint's state dict as it is, and the model that it makes, in float32."""
    state = read_checkpoint(path)
    try:
        return state, build_model(state)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from None


def trained(delta: Delta, place: Path) -> tuple[dict[str, Tensor], CLIP]:
    """The base's state dict as it is, and the model with the delta applied, in float32."""
    state, model = read_clip(place)
    apply_delta(model, delta)
    return state, model


def write(out: Path, state: dict[str, Tensor]) -> None:
    """Write a state dict in the format that the file's name asks for."""
    tensors = {  # copies, for a view would bring all of its storage along
        key: tensor.detach().clone(memory_format=torch.contiguous_format)
        for key, tensor in state.items()
        if isinstance(tensor, Tensor)
    }
    if out.suffix.lower() == ".safetensors":
        return atomic_write(out, safetensors.torch.save(tensors))
    atomic_write(out, lambda file: torch.save(tensors, file))


# The command line


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments: `run`, and what it takes."""
    parser = OneLineErrorParser(prog="delta.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[..., str], files: Sequence[str], out: str, help: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        for file in files:
            command.add_argument(file, type=Path, metavar=file.upper())
        if out:
            command.add_argument("--out", type=Path, required=True, metavar=out, help="to write")
            command.add_argument(
                "--base", type=backbone, help="name or path of the base (the backbone in FILE)"
            )
        return command

    add("inspect", inspect, ["file"], "", "show what a delta changes")
    add("apply", apply, ["file"], "FULL", "write the trained weights")
    command = add("scale", scale, ["file"], "SCALED", "scale what a delta changes")
    command.add_argument(
        "alpha",
        type=bounded_number(float, 0),
        metavar="ALPHA",
        help="factor: 0 is the base, 1 is FILE",
    )
    add("revert", revert, ["full", "file"], "BASE", "write the base of full weights")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = vars(parse_args(argv))
    run, _ = args.pop("run"), args.pop("command")
    try:
        text = run(**args)
    except (ValueError, OSError) as error:
        print(one_line(f"delta.py: error: {format_error(error)}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("delta.py: interrupted", file=sys.stderr)
        return 130
    print_quietly(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
