"""Sparse deltas: only those entries of trained matrices that differ from where they began.

A delta is a safetensors file. For each matrix, by its NAME in the model, it holds

    NAME.indices    positions in the flattened matrix, increasing: (c,) int32, int64 from 2^31 on
    NAME.values     the trained values there, bit for bit: (c,) in the matrix's own dtype

both empty where nothing changed; and as metadata `format`, `version`, `shapes` (JSON, by NAME),
`base_digest` (of all weights of the model before training) and whatever else its writer adds, such
as `backbone`. The base and a delta together give the trained weights:

    save_delta("weights.safetensors", matrices, base.state_dict(), weights_digest(base))
    apply_delta(model, read_delta("weights.safetensors"))  # refused unless the model is the base
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from utils import atomic_write

__all__ = [
    "SparseTensorDelta", "Delta", "apply_delta", "changed_indices", "diff_state_dict",
    "read_delta", "save_delta", "interpolate_weights_", "interpolated_weights", "apply_state_diff", "state_dict_sha256",  # noqa: E501
]  # fmt: skip

FORMAT, VERSION = "sparse-delta", 1
INT_VIEW = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an entry
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of values
DIMENSIONS = 16  # of a matrix, at most


StateDiff = dict[str, tuple[Tensor | None, Tensor]]  # by name: as `pack` returns it


class SparseTensorDelta(NamedTuple):
    """What became of one matrix."""

    indices: Tensor  # (c,) int32 or int64: increasing positions in the flattened matrix
    values: Tensor  # (c,) what stands there now
    shape: tuple[int, ...]  # the matrix's


class Delta(NamedTuple):
    """A delta as `read_delta` returns it: checked, on the CPU."""

    tensors: dict[str, SparseTensorDelta]
    metadata: dict[str, str]
    path: Path


def state_dict_sha256(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over names and float32 values of all weights, whatever file or precision they are of.

    Args:
        weights: A model, or a state dict as a model's `state_dict()` gives it.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(name.encode())
        sha.update(tensor.detach().float().cpu().contiguous().numpy())
    return sha.hexdigest()


def changed_indices(base: Tensor, now: Tensor) -> Tensor:
    """Find where two tensors of one shape, dtype and device differ in any bit.

    So 0.0 and -0.0 differ, and a NaN equals itself.

    Returns:
        Positions in the flattened tensors, increasing: (c,) int32, int64 from 2^31 entries on.

    Raises:
        ValueError: Shapes or dtypes differ.
    """
    if base.shape != now.shape or base.dtype != now.dtype:
        raise ValueError(
            f"cannot compare {_words(base.dtype, base.shape)} with {_words(now.dtype, now.shape)}"
        )
    bits = INT_VIEW[base.element_size()]
    a, b = (t.detach().contiguous().view(bits).flatten() for t in (base, now))
    return (a != b).nonzero().flatten().to(torch.int32 if len(a) < 2**31 else torch.int64)


def _change(base: Tensor, now: Tensor) -> SparseTensorDelta:
    """What became of a tensor, on the CPU."""
    now = now.detach().cpu()
    indices = changed_indices(base.detach().cpu(), now)
    return SparseTensorDelta(indices, now.flatten()[indices.long()], tuple(now.shape))


def diff_state_dict(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> StateDiff:
    """How tensors differ from those that a base has by the same names, as plain CPU tensors.

    Returns:
        By name, positions and values as in a Change; or None and the whole tensor, where that takes
        less room or the base has no such tensor.
    """
    packed: StateDiff = {}
    for name, tensor in tensors.items():
        if name in base:
            indices, values, _ = _change(base[name], tensor)
            if indices.nbytes + values.nbytes < tensor.nbytes:
                packed[name] = indices, values
                continue
        packed[name] = None, tensor.detach().cpu().clone()
    return packed


@torch.no_grad()
def apply_state_diff(
    packed: StateDiff, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> None:
    """Give tensors, in place, the values that they had when they were packed with this base."""
    for name, (indices, values) in packed.items():
        if indices is not None:
            at, some = indices.long(), values
            values = base[name].detach().cpu().clone(memory_format=torch.contiguous_format)
            values.view(-1)[at] = some
        tensors[name].copy_(values)


def save_delta(
    path: str | os.PathLike,
    matrices: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    base_sha256: str,
    **metadata: str,
) -> None:
    """Write a delta, in one piece or not at all.

    Args:
        path: The file.
        matrices: Trained matrices by their name in the model, on any device.
        base: The same before training, by the same names; it may hold more.
        base_sha256: `state_dict_sha256` of the whole model before.
        metadata: More entries of the metadata, such as backbone="ViT-B/16".

    Raises:
        ValueError: The base has no such matrix, or one of another shape or dtype; a changed entry
            is not finite.
        OSError: The file cannot be written.
    """
    tensors, shapes = {}, {}
    for name, matrix in matrices.items():
        if name not in base:
            raise ValueError(f"{path} is not written: the base has no {name}")
        indices, values, _ = _change(base[name], matrix)
        if not values.isfinite().all():
            raise ValueError(
                f"{path} is not written: {name} is not finite; lower the learning rate"
            )
        tensors[f"{name}.indices"], tensors[f"{name}.values"] = indices, values
        shapes[name] = list(matrix.shape)
    metadata |= {"format": FORMAT, "version": str(VERSION), "base_digest": base_sha256}
    metadata["shapes"] = json.dumps(shapes)
    atomic_write(path, _orderly(safetensors.torch.save(tensors, metadata=metadata)))


def _orderly(data: bytes) -> bytes:
    """The same safetensors file with sorted metadata, whose order safetensors leaves to chance."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def read_delta(path: str | os.PathLike) -> Delta:
    """Read a delta and check all that can be checked without its base.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, not a delta, of a newer version, or contradicts itself.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there are no weights at {path}: name a file that --save_weights wrote"
        )
    tensors: dict[str, Tensor] = {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") == FORMAT:  # else it may be large, and is refused below
                # Copies: the tensors of safe_open change, or are lost, with the file.
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # damage shows in many ways, and not in safetensors' own error alone
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{path} is damaged or not a safetensors file ({reason}): get it or save it again"
        ) from None
    try:
        _check_metadata(metadata)
        shapes = _shapes(metadata)
        matrices = {name: _take(tensors, name, shape) for name, shape in shapes.items()}
        if tensors:
            raise ValueError(f"it holds {min(tensors)!r}, which belongs to none of its matrices")
    except ValueError as error:
        raise ValueError(f"{path} is refused: {error}; save it again with --save_weights") from None
    return Delta(matrices, metadata, path)


@torch.no_grad()
def apply_delta(target: nn.Module | Mapping[str, Tensor], delta: Delta) -> None:
    """Turn the base of a delta into the trained weights, in place, all of it or nothing.

    Args:
        target: The model that was adapted, or its state dict, on any device. Its matrices may be
            of a wider dtype than the delta's values, which is as exact.
        delta: What `read_delta` returned.

    Raises:
        ValueError: The target is not the delta's base, or lacks one of the delta's matrices, or
            has it in another shape or in a dtype that would round; nothing is written then.
    """
    state = target.state_dict() if isinstance(target, nn.Module) else target
    if state_dict_sha256(state) != delta.metadata["base_digest"]:
        raise ValueError(
            f"{delta.path} belongs to other weights than these: use those that it was trained "
            f"from, {delta.metadata.get('backbone', 'an unnamed base')!r}"
        )
    for name, (_, values, shape) in delta.tensors.items():
        if name not in state or state[name].shape != shape:
            raise ValueError(
                f"{delta.path} changes {_words(values.dtype, shape)} {name!r}, which these "
                "weights do not have: save it again with --save_weights"
            )
        dtype = state[name].dtype
        if torch.promote_types(values.dtype, dtype) != dtype:
            raise ValueError(
                f"{delta.path} holds {_words(values.dtype)} values, which {name} would round: "
                f"load the model in that precision, not in {_words(dtype)}"
            )
    for name, (indices, values, _) in delta.tensors.items():
        flat = state[name].flatten()  # a view if the matrix is contiguous, else a copy
        flat[indices.to(flat.device, torch.int64)] = values.to(flat)
        state[name].copy_(flat.view_as(state[name]))


@torch.no_grad()
def interpolate_weights_(
    matrices: Mapping[str, Tensor], base: Mapping[str, Tensor], alpha: float
) -> None:
    """Scale what was learned, in place: to base + alpha (trained - base), each entry rounded once.

    Bit for bit the base at 0 and the trained weights at 1. It is the interpolation of WiSE-FT
    (Wortsman et al. 2022, arXiv 2109.01903), here of the entries alone that differ.

    Raises:
        ValueError: A matrix has another shape or dtype in the base.
    """
    for name, matrix in matrices.items() if alpha != 1 else ():
        start, flat = base[name].cpu(), matrix.cpu().flatten()  # not every GPU has float64
        at = changed_indices(start, matrix.cpu()).long()
        before = start.flatten()[at]
        step = alpha * (flat[at].double() - before.double())
        flat[at] = (before.double() + step).to(flat.dtype) if alpha else before
        matrix.copy_(flat.view_as(matrix))


@contextmanager
def interpolated_weights(
    matrices: Mapping[str, Tensor], base: Mapping[str, Tensor], alpha: float
) -> Iterator[None]:
    """Scale what was learned for a while; afterwards it is as before, bit for bit."""
    kept = {name: matrix.detach().clone() for name, matrix in matrices.items()}
    try:
        yield interpolate_weights_(matrices, base, alpha)
    finally:
        with torch.no_grad():
            for name, matrix in matrices.items():
                matrix.copy_(kept[name])


def _check_metadata(metadata: Mapping[str, str]) -> None:
    """Refuse what is not a delta, or one that this code cannot read."""
    if metadata.get("format") != FORMAT:
        raise ValueError("it is not a sparse delta")
    version = metadata.get("version", "")
    if version != str(VERSION):
        raise ValueError(f"it is a delta of version {version!r}, and {VERSION} is read here")
    if not re.fullmatch("[0-9a-f]{64}", metadata.get("base_digest", "")):
        raise ValueError("the digest of its base is missing")


def _shapes(metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The shapes of a delta's matrices by name."""
    try:
        shapes: Any = json.loads(metadata["shapes"])
        sound = isinstance(shapes, dict) and all(map(_is_shape, shapes.values()))
    except (KeyError, ValueError, RecursionError):
        sound = False
    if not sound or not all(name.isprintable() for name in shapes):
        raise ValueError("its list of shapes is missing or broken")
    return {name: tuple(shape) for name, shape in shapes.items()}


def _is_shape(shape: Any) -> bool:
    """Whether a JSON value is a list of sizes that a tensor could have."""
    if not isinstance(shape, list) or len(shape) > DIMENSIONS:
        return False
    return all(type(n) is int and n >= 0 for n in shape) and math.prod(shape) < 2**63


def _take(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> SparseTensorDelta:
    """Take one matrix's tensors out of those of the file, and check them."""
    try:
        indices, values = tensors.pop(f"{name}.indices"), tensors.pop(f"{name}.values")
    except KeyError as error:
        raise ValueError(f"{error} is missing") from None
    if indices.dtype not in (torch.int32, torch.int64) or values.dtype not in DTYPES:
        raise ValueError(
            f"{name} has {_words(indices.dtype)} indices and {_words(values.dtype)} values"
        )
    if indices.dim() != 1 or indices.shape != values.shape:
        raise ValueError(
            f"{name} has indices of shape {tuple(indices.shape)} and values of "
            f"{tuple(values.shape)}, not as many of both"
        )
    if (indices[1:] <= indices[:-1]).any():
        raise ValueError(f"the indices of {name} do not increase, or repeat")
    entries = math.prod(shape)
    if len(indices) and not 0 <= int(indices[0]) <= int(indices[-1]) < entries:
        raise ValueError(f"an index of {name} lies outside of its {entries} entries")
    if not values.isfinite().all():
        raise ValueError(f"a value of {name} is not finite")
    return SparseTensorDelta(indices, values, shape)


def _words(dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> str:
    """A dtype, and a shape if there is one, in words: float32 (3, 4)."""
    name = str(dtype).removeprefix("torch.")
    return name if shape is None else f"{name} {tuple(shape)}"
