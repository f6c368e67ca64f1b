"""Inspect weights.safetensors, scale it, apply it to its base, or restore the base.

    python scripts/delta.py inspect weights.safetensors
    python scripts/delta.py apply weights.safetensors --out full.pt           # for clip.load
    python scripts/delta.py scale weights.safetensors 0.5 --out half.safetensors
    python scripts/delta.py revert full.pt weights.safetensors --out base.pt

The base is the backbone that the delta names; --base gives another path to it. Full weights are a
state dict, written as safetensors if --out ends in .safetensors, else by torch.save. Their trained
weights are float32, also if the base is an fp16 checkpoint; all others keep their dtype.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from reporting.markdown import markdown
from torch import Tensor

import clip
from clip import CLIP
from optimizers import delta as deltas
from run_utils import OneLineErrorParser, backbone_arg, bounded_number, path_arg
from runs.cli import run_cli
from runs.weights import resolve_base, save_state_dict

COLUMNS = ("matrix", "shape", "entries", "share, %", "bytes", "bytes of all")


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineErrorParser(prog="delta.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    alpha = bounded_number(float, 0)
    for function, inputs, help in (
        (inspect, {"file": path_arg}, "show what a delta changes"),
        (apply, {"file": path_arg}, "write the trained weights"),
        (scale, {"file": path_arg, "alpha": alpha}, "scale its changes: 0 is the base, 1 is FILE"),
        (revert, {"full": path_arg, "file": path_arg}, "write the base of full weights"),
    ):
        command = commands.add_parser(function.__name__, help=help, description=help)
        command.set_defaults(function=function)
        for name, kind in inputs.items():
            command.add_argument(name, type=kind, metavar=name.upper())
        if function is not inspect:
            command.add_argument("--out", type=path_arg, required=True, help="file to write")
            command.add_argument(
                "--base", type=backbone_arg, help="name or path of the base (the backbone in FILE)"
            )
    args = vars(parser.parse_args(argv))
    function = args.pop("function")
    return run_cli(lambda: print(function(**args)), "delta.py")


def inspect(file: Path) -> str:
    """Return a table of a delta's tensors and their sum, and its metadata."""
    delta = deltas.read_delta(file)
    rows = []  # name, shape, changed entries, entries, bytes, bytes of the whole tensor
    for name, (indices, values, shape) in delta.tensors.items():
        entries, nbytes = math.prod(shape), indices.nbytes + values.nbytes
        sizes = len(indices), entries, nbytes, entries * values.element_size()
        rows.append((name, " x ".join(map(str, shape)), *sizes))
    totals = [sum(column) for column in list(zip(*rows, strict=True))[2:]]
    rows.append((f"all {len(rows)}", "", *totals))
    cells = [
        [name, shape, f"{changed:,}", f"{100 * changed / entries:.4f}", f"{nbytes:,}", f"{full:,}"]
        for name, shape, changed, entries, nbytes, full in rows
    ]
    metadata = [f"{key}: {text}" for key, text in sorted(delta.metadata.items()) if key != "shapes"]
    size = f"file: {file.stat().st_size:,} bytes"
    return "\n".join([markdown(COLUMNS, cells, left=2), "", size, *metadata])


def apply(file: Path, out: Path, base: str | None) -> str:
    """Write the trained weights as a full checkpoint."""
    delta, base_path = open_delta(file, base, out, file)
    state, model = read_clip(base_path)
    deltas.apply_delta(model, delta)
    trained = {name: model.get_parameter(name) for name in delta.tensors}
    save_state_dict(out, state | trained)
    entries = sum(len(change.indices) for change in delta.tensors.values())
    return f"{out}: {base_path} with {entries:,} entries of {len(delta.tensors)} matrices changed"


def scale(file: Path, alpha: float, out: Path, base: str | None) -> str:
    """Write a delta whose values are base + alpha (value - base)."""
    delta, _ = open_delta(file, base, out, file)
    model, _ = clip.load(base or delta.metadata["backbone"], "cpu")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    deltas.apply_delta(model, delta)
    trained = {name: model.get_parameter(name).detach() for name in delta.tensors}
    deltas.interpolate_weights_(trained, before, alpha)
    wise = f"{float(delta.metadata.get('wise', 1)) * alpha:g}"
    metadata = delta.metadata | {"wise": wise}
    deltas.save_delta(out, trained, before, metadata["base_digest"], **metadata)
    return f"{out}: {file}, scaled by {alpha:g}"


def revert(full: Path, file: Path, out: Path, base: str | None) -> str:
    """Write the base again, if the full weights are the base with the delta applied."""
    delta, base_path = open_delta(file, base, out, full, file)
    state, model = read_clip(base_path)
    deltas.apply_delta(model, delta)
    if deltas.state_dict_sha256(model) != deltas.state_dict_sha256(read_clip(full)[1]):
        raise ValueError(f"{full} is not what {file} makes of {base_path}: name what `apply` wrote")
    save_state_dict(out, state)
    return f"{out}: {base_path}, without {file}"


def open_delta(file: Path, base: str | None, out: Path, *inputs: Path) -> tuple[deltas.Delta, Path]:
    """Return a delta and the path of its base; a ValueError if `out` would replace an input."""
    delta = deltas.read_delta(file)
    base_path = resolve_base(delta, base)
    if out.exists() and any(out.samefile(path) for path in (*inputs, base_path)):
        raise ValueError(f"--out {out} would replace what it is made from: give another name")
    return delta, base_path


def read_clip(path: Path) -> tuple[dict[str, Tensor], CLIP]:
    """Return the state dict of a checkpoint as it is, and its model in float32."""
    try:
        state = clip.read_checkpoint(path)
        return state, clip.build_model(state)
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be used here ({error}); for CLIPs that open_clip builds, "
            "scripts/export.py RUN --to open_clip writes full weights"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
