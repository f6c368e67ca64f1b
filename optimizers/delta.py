"""Files that hold only those entries of trained weights that differ from the base weights.

A delta is a safetensors file. For each trained weight, by its NAME in the model, it holds

    NAME.indices    flat positions, increasing: (c,) int32, int64 from 2^31 entries on
    NAME.values     the trained values at these positions, bit for bit: (c,) in the weight's dtype

Both are empty if nothing changed. The metadata has `format`, `version`, `shapes` (JSON, by NAME),
`base_digest` (SHA-256 of all weights of the model before training), and what else the writer adds,
such as `backbone`. The base and a delta give the trained weights:

    save_delta("weights.safetensors", trained, base.state_dict(), state_dict_sha256(base))
    apply_delta(model, read_delta("weights.safetensors"))  # refused unless the model is the base
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from utils import atomic_write

FORMAT = {"format": "sparse-delta", "version": "1"}
INT_DTYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per entry

# By name: the indices and values of `changed_entries`, or None and the whole tensor.
StateDiff = dict[str, tuple[Tensor | None, Tensor]]


class SparseTensorDelta(NamedTuple):
    """The changed entries of one tensor."""

    indices: Tensor  # (c,) int32 or int64: increasing positions in the flattened tensor
    values: Tensor  # (c,) the new values there
    shape: tuple[int, ...]  # of the tensor


class Delta(NamedTuple):
    """A validated delta, on the CPU."""

    tensors: dict[str, SparseTensorDelta]
    metadata: dict[str, str]
    path: Path


def save_delta(
    path: str | Path,
    trained: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    base_sha256: str,
    **metadata: str,
) -> None:
    """Write a delta, atomically.

    Args:
        trained: Trained weights by their name in the model, on any device.
        base: The same weights before training; it may hold more.
        base_sha256: `state_dict_sha256` of the whole model before training.
        metadata: More entries of the metadata, such as backbone="ViT-B/16".

    Raises:
        ValueError: A changed entry is not finite.
    """
    tensors = {}
    for name, tensor in trained.items():
        indices, values = changed_entries(base[name], tensor)
        if not values.isfinite().all():
            raise ValueError(f"{path} is not written: {name} is not finite; lower the lr")
        tensors |= {f"{name}.indices": indices, f"{name}.values": values}
    shapes = json.dumps({name: list(tensor.shape) for name, tensor in trained.items()})
    metadata |= {**FORMAT, "base_digest": base_sha256, "shapes": shapes}
    atomic_write(path, _sort_metadata(safetensors.torch.save(tensors, metadata=metadata)))


def _sort_metadata(data: bytes) -> bytes:
    """Sort the metadata of a safetensors file: safetensors orders it at random."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def changed_entries(base: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """Find where two tensors of one shape and dtype differ in any bit.

    So 0.0 and -0.0 differ, and a NaN equals itself.

    Returns:
        Positions in the flattened tensors, increasing, (c,) int32, or int64 from 2^31 entries on;
        and the values of `now` there. Both are on the CPU.
    """
    before, after = (t.detach().cpu().flatten() for t in (base, now))
    int_dtype = INT_DTYPES[base.element_size()]
    indices = (before.view(int_dtype) != after.view(int_dtype)).nonzero().flatten()
    return indices.to(torch.int32 if len(after) < 2**31 else torch.int64), after[indices]


def read_delta(path: str | Path) -> Delta:
    """Read a delta and check everything that can be checked without the base.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or not a delta.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: name a file that --save_weights wrote")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if not FORMAT.items() <= metadata.items():
                raise ValueError("its metadata is not a delta's")
            shapes = json.loads(metadata["shapes"])
            tensors = {name: _read_entries(file, name, shape) for name, shape in shapes.items()}
    except Exception as error:  # damage raises errors of many types
        raise ValueError(
            f"{path} is damaged, or not a sparse delta of version {FORMAT['version']} ({error}): "
            "save it again with --save_weights"
        ) from None
    return Delta(tensors, metadata, path)


def _read_entries(file: safetensors.safe_open, name: str, shape: list[int]) -> SparseTensorDelta:
    """Read the entries of a weight: floating-point values at increasing positions in its shape."""
    # Cloned, because the tensors of safe_open change or vanish with the file.
    indices, values = (file.get_tensor(f"{name}.{part}").clone() for part in ("indices", "values"))
    is_inside = not len(indices) or 0 <= indices[0] <= indices[-1] < math.prod(shape)
    is_numeric = indices.dtype in (torch.int32, torch.int64) and values.is_floating_point()
    fits = is_numeric and is_inside and indices.shape == values.shape
    if not fits or (indices.diff() <= 0).any():
        raise ValueError(f"{name} lacks floating-point values at increasing positions in {shape}")
    return SparseTensorDelta(indices, values, tuple(shape))


@torch.no_grad()
def apply_delta(target: nn.Module | Mapping[str, Tensor], delta: Delta) -> None:
    """Write the trained weights into their base, a model or its state dict, in place.

    Raises:
        ValueError: The target is not the delta's base, lacks one of its weights, or has one in
            another shape or in a dtype that would round. It is unchanged.
    """
    state = target.state_dict() if isinstance(target, nn.Module) else target
    if state_dict_sha256(state) != delta.metadata.get("base_digest"):
        raise ValueError(
            f"{delta.path} belongs to other weights than these: use those that it was trained "
            f"from, {delta.metadata.get('backbone', 'an unnamed base')!r}"
        )
    for name, (_, values, shape) in delta.tensors.items():
        if name not in state or state[name].shape != shape:
            raise ValueError(
                f"{delta.path} changes {name!r} of shape {shape}, which these weights do not have: "
                "save it again with --save_weights"
            )
        if torch.promote_types(values.dtype, state[name].dtype) != state[name].dtype:
            raise ValueError(
                f"{delta.path} holds values in {values.dtype}, which {name} in {state[name].dtype} "
                "would round: load the model in the wider precision"
            )
    for name, (indices, values, _) in delta.tensors.items():
        write_entries_(state[name], indices, values)


def write_entries_(tensor: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write values at positions of the flattened tensor, in place."""
    flat = tensor.flatten()  # a view, or a copy if the tensor is not contiguous
    flat[indices.to(flat.device, torch.int64)] = values.to(flat)
    tensor.copy_(flat.view_as(tensor))


def state_dict_sha256(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 of the names and float32 values of all weights, for any file format and precision."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(name.encode())
        sha.update(tensor.detach().float().cpu().contiguous().numpy())
    return sha.hexdigest()


def diff_state_dict(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> StateDiff:
    """Return the difference of tensors to those of the same name in a base, for a checkpoint.

    A tensor is stored whole if the base lacks it, or if its changed entries take more memory.
    """
    diff: StateDiff = {}
    for name, tensor in tensors.items():
        entries = changed_entries(base[name], tensor) if name in base else None
        if entries is None or entries[0].nbytes + entries[1].nbytes >= tensor.nbytes:
            entries = None, tensor.detach().cpu().clone()
        diff[name] = entries
    return diff


@torch.no_grad()
def apply_state_diff(
    diff: StateDiff, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> None:
    """Restore, in place, the tensors from which `diff_state_dict` made a diff to this base."""
    for name, (indices, values) in diff.items():
        tensors[name].copy_(values if indices is None else base[name])
        if indices is not None:
            write_entries_(tensors[name], indices, values)


@torch.no_grad()
def interpolate_weights_(
    weights: Mapping[str, Tensor], base: Mapping[str, Tensor], alpha: float
) -> None:
    """Set weights, in place, to base + alpha (weights - base), each entry rounded once.

    The result is the base at 0 and the trained weights at 1, bit for bit. This is the interpolation
    of WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903) over the entries that differ.
    """
    for name, weight in weights.items() if alpha != 1 else ():
        indices, values = changed_entries(base[name], weight)  # on the CPU, which has float64
        before = base[name].cpu().flatten()[indices.long()]
        step = alpha * (values.double() - before.double())
        mixed = (before.double() + step).to(before.dtype) if alpha else before
        write_entries_(weight, indices, mixed)


@contextmanager
def interpolated_weights(
    weights: Mapping[str, Tensor], base: Mapping[str, Tensor], alpha: float
) -> Iterator[None]:
    """Interpolate weights within the context, and restore them afterwards, bit for bit."""
    trained = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        yield interpolate_weights_(weights, base, alpha)
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(trained[name])
