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

FORMAT, VERSION = "sparse-delta", 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of values
INT_VIEW = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per entry

# By name: the indices and values of a SparseTensorDelta, or None and the whole tensor.
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
        path: The file.
        trained: Trained weights by their name in the model, on any device.
        base: The same weights before training; it may hold more.
        base_sha256: `state_dict_sha256` of the whole model before training.
        metadata: More entries of the metadata, such as backbone="ViT-B/16".

    Raises:
        ValueError: The base lacks a weight or has it in another shape or dtype, or a changed entry
            is not finite.
        OSError: The file cannot be written.
    """
    tensors, shapes = {}, {}
    for name, tensor in trained.items():
        if name not in base:
            raise ValueError(f"{path} is not written: the base has no {name}")
        indices, values, _ = _tensor_delta(base[name], tensor)
        if not values.isfinite().all():
            raise ValueError(f"{path} is not written: {name} is not finite; lower the lr")
        tensors[f"{name}.indices"], tensors[f"{name}.values"] = indices, values
        shapes[name] = list(tensor.shape)
    metadata |= {"format": FORMAT, "version": str(VERSION), "base_digest": base_sha256}
    metadata["shapes"] = json.dumps(shapes)
    atomic_write(path, _sort_metadata(safetensors.torch.save(tensors, metadata=metadata)))


def _sort_metadata(data: bytes) -> bytes:
    """Sort the metadata of a safetensors file: safetensors orders it at random."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def read_delta(path: str | Path) -> Delta:
    """Read a delta and check everything that can be checked without the base.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, not a delta, of another version, or inconsistent.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: name a file that --save_weights wrote")
    tensors: dict[str, Tensor] = {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") == FORMAT:  # other files may be large
                # Cloned, because the tensors of safe_open change or vanish with the file.
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # damage raises errors of many types
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{path} is damaged or not a safetensors file ({reason}): copy or save it again"
        ) from None
    try:
        return Delta(_parse(metadata, tensors), metadata, path)
    except ValueError as error:
        raise ValueError(f"{path} is refused: {error}; save it again with --save_weights") from None


def _parse(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, SparseTensorDelta]:
    """Check the contents of a delta and group its tensors by weight."""
    if metadata.get("format") != FORMAT:
        raise ValueError("it is not a sparse delta")
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"its version is {metadata.get('version')!r}, and only {VERSION} is read")
    try:
        shapes = json.loads(metadata["shapes"])
        shapes = {name: tuple(map(int, shape)) for name, shape in shapes.items()}
        if not all(map(str.isprintable, shapes)):
            raise ValueError
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ValueError("its list of shapes is missing or broken") from None
    expected = {f"{name}.{part}" for name in shapes for part in ("indices", "values")}
    if differing := expected ^ tensors.keys():
        raise ValueError(f"its tensors and its list of shapes disagree about {min(differing)!r}")
    parsed = {}
    for name, shape in shapes.items():
        indices, values = tensors[f"{name}.indices"], tensors[f"{name}.values"]
        _check_indices(name, indices, values, math.prod(shape))
        parsed[name] = SparseTensorDelta(indices, values, shape)
    return parsed


def _check_indices(name: str, indices: Tensor, values: Tensor, entries: int) -> None:
    """Raise a ValueError unless these are different positions and their values."""
    numbers = indices.dtype in (torch.int32, torch.int64) and values.dtype in DTYPES
    if not numbers or not indices.shape == values.shape == (values.numel(),):
        raise ValueError(f"{name} does not have one floating-point value for each integer index")
    inside = not len(indices) or 0 <= int(indices[0]) <= int(indices[-1]) < entries
    if not inside or (indices[1:] <= indices[:-1]).any():
        raise ValueError(f"the indices of {name} do not increase within its {entries} entries")


@torch.no_grad()
def apply_delta(target: nn.Module | Mapping[str, Tensor], delta: Delta) -> None:
    """Write the trained weights into their base, in place. Nothing is written if it is refused.

    Args:
        target: The base model or its state dict, on any device. Its dtype may be wider than the
            delta's.
        delta: Return value of `read_delta`.

    Raises:
        ValueError: The target is not the delta's base, lacks one of its weights, or has one in
            another shape or in a dtype that would round.
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
        flat = state[name].flatten()  # a view, or a copy if the weight is not contiguous
        flat[indices.to(flat.device, torch.int64)] = values.to(flat)
        state[name].copy_(flat.view_as(state[name]))


def state_dict_sha256(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 of the names and float32 values of all weights, for any file format and precision.

    Args:
        weights: A model or its state dict.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(name.encode())
        sha.update(tensor.detach().float().cpu().contiguous().numpy())
    return sha.hexdigest()


def changed_indices(base: Tensor, now: Tensor) -> Tensor:
    """Find where two tensors of the same shape, dtype and device differ in any bit.

    So 0.0 and -0.0 differ, and a NaN equals itself.

    Returns:
        Positions in the flattened tensors, increasing: (c,) int32, int64 from 2^31 entries on.

    Raises:
        ValueError: Shapes or dtypes differ.
    """
    if base.shape != now.shape or base.dtype != now.dtype:
        kinds = [f"{t.dtype} {tuple(t.shape)}" for t in (base, now)]
        raise ValueError(f"cannot compare {' with '.join(kinds)}")
    dtype = INT_VIEW[base.element_size()]
    a, b = (t.detach().contiguous().view(dtype).flatten() for t in (base, now))
    return (a != b).nonzero().flatten().to(torch.int32 if len(a) < 2**31 else torch.int64)


def _tensor_delta(base: Tensor, now: Tensor) -> SparseTensorDelta:
    """The changed entries of a tensor, on the CPU."""
    now = now.detach().cpu()
    indices = changed_indices(base.detach().cpu(), now)
    return SparseTensorDelta(indices, now.flatten()[indices.long()], tuple(now.shape))


def diff_state_dict(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> StateDiff:
    """Return the difference of tensors to those of the same name in a base, for a checkpoint.

    A tensor is stored whole if the base lacks it, or if its changed entries take more memory.
    """
    diff: StateDiff = {}
    for name, tensor in tensors.items():
        if name in base:
            indices, values, _ = _tensor_delta(base[name], tensor)
            if indices.nbytes + values.nbytes < tensor.nbytes:
                diff[name] = indices, values
                continue
        diff[name] = None, tensor.detach().cpu().clone()
    return diff


@torch.no_grad()
def apply_state_diff(
    diff: StateDiff, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> None:
    """Restore, in place, the tensors from which `diff_state_dict` made a diff to this base."""
    for name, (indices, values) in diff.items():
        if indices is not None:
            tensor = base[name].detach().cpu().clone(memory_format=torch.contiguous_format)
            tensor.view(-1)[indices.long()] = values
            values = tensor
        tensors[name].copy_(values)


@torch.no_grad()
def interpolate_weights_(
    weights: Mapping[str, Tensor], base: Mapping[str, Tensor], alpha: float
) -> None:
    """Set weights, in place, to base + alpha (weights - base), each entry rounded once.

    The result is the base at 0 and the trained weights at 1, bit for bit. This is the interpolation
    of WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903) over the entries that differ.

    Raises:
        ValueError: A weight has another shape or dtype in the base.
    """
    for name, weight in weights.items() if alpha != 1 else ():
        start, flat = base[name].cpu(), weight.cpu().flatten()  # not every GPU has float64
        indices = changed_indices(start, weight.cpu()).long()
        before = start.flatten()[indices]
        step = alpha * (flat[indices].double() - before.double())
        flat[indices] = (before.double() + step).to(flat.dtype) if alpha else before
        weight.copy_(flat.view_as(weight))


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
